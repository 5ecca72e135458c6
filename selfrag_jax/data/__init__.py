"""Training examples, batches of them, and questions to answer: everything read from data files."""
