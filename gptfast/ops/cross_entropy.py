from gptfast.ops.reference import cross_entropy  # kernels follow
