"""How text is chosen: what a sequence starts with and what it ends as; the steps between are ops."""
