"""The losses: one idea a file.

reduction          the one place for padding, counts and means
loss               what every loss is: a name, a weight, what it asks to see, a sum over its units
labels             the task's own loss
logits             softened predictions
hidden_states      layers, and the embedding output
attention_scores   QK^T/sqrt(d)
recipes            a paper's method as a list of losses
"""
