"""Which tokens are kept at a cut, on tensors, and what dropped ones become."""
