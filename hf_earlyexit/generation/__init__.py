"""`generate` with exits: the mixin, refusals, prepared copies of the weights, the certificate at run time."""
