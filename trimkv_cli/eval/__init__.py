"""What a budget costs: questions with known answers, asked of the same model under several cache policies."""
