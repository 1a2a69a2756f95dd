from gptfast.ops.reference import add_layer_norm  # kernels follow
