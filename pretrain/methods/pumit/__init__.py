"""PUMIT: a soft visual tokenizer, then a vision transformer that predicts the tokens of what is masked."""
