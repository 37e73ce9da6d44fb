"""How `robustft.functional` is computed: the `registry` of operators, their families, bodies and references."""
