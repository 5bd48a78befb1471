"""The losses: one idea a file. README.md says which recipe is for which data and models.

reduction            the one place for padding, counts and means
loss                 what every loss is: a name, a weight, what it asks to see, a sum over its units
labels               the task's own loss
logits               softened predictions
hidden_states        layers, the embedding output, a hint
attention_scores     QK^T/sqrt(d), and the distributions made of it
relations            queries to queries, keys to keys, values to values
combined_layers      each layer against a group of the teacher's
mixed_layers         each layer against a learnt mix of the teacher's
transport            the cheapest flow between layers
transported_layers   all layers against all
recipes              a paper's method as a list of losses
"""
