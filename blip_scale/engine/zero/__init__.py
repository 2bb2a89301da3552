"""The ZeRO engine: DeepSpeed, this rank's slices of parameters and the momentum average."""
