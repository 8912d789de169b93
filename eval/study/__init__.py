"""The whole comparison: ways of training, sharing modes and seeds, in parts that can be resumed and merged."""
