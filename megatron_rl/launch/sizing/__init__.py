"""What a run needs, by arithmetic alone: memory of each rank, operations, bytes moved, and layouts that would fit."""
