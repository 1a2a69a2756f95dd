from gptfast.ops.reference import linear_cross_entropy  # kernels follow
