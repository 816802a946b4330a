"""What is minimised: the flow objective of the generator, the losses of the tokenizer."""
