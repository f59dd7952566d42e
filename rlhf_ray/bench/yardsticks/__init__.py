"""What the benchmarks compare with. No module here is imported by the system itself."""
