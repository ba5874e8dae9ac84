"""Using a tuned prompt: answers, label scores, and why an answer ended."""
