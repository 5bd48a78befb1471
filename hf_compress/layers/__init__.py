"""Which layers a student keeps: finding a model's layers, choosing some, dropping them, and what follows for the teacher."""
