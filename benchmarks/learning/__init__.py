"""The learning table: every algorithm on three small generated tasks (benchmarks/learning_table.py runs it)."""
