"""Vocabulary tables that stay where they are: only the rows that a prompt names are read (VocabTailor)."""
