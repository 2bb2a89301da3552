def pretraining_flops(*a): return 1e9
