"""What can be trained; one module a task."""
