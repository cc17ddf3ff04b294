"""What one GPU answers in a few minutes: parts that end in time, resume, and write small files.

``python -m benchmarks.gpu PART`` runs one; ``plan`` says what each of them costs.
"""
