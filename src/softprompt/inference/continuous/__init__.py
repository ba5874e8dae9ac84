"""Many requests at once, each with the prompt it names: a worker thread and what it runs."""
