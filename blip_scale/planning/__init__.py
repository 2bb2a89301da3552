"""What a run will need, on paper: memory, time, data and storage of a recipe on a cluster."""
