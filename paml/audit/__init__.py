"""Which labels to look at again: unobserved ones that are likely positive, observed ones that are likely wrong."""
