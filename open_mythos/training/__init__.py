"""Training: data, objective, optimiser, parallelism, checkpoints. Import the submodule you need."""
