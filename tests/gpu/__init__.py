"""What has to hold on a GPU. Everything runs on the CPU too, as far as it means something there, so
that it stays runnable; `python -m tests.gpu` runs it with the benchmarks and says what is left out.
"""
