from gptfast.ops.reference import sample  # kernels follow
