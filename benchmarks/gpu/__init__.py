"""What `benchmarks/bench_gpu.py` measures."""
