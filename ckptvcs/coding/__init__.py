"""From tensors to coded slices: which method codes what, with which settings, and how well."""
