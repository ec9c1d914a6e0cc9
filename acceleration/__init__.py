"""The engine: what runs, why, and what it cost. Imports torch and numpy alone (except ``hosts``)."""
