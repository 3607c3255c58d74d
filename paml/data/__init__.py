"""From shards and a label table to batches on a device: plan, read by offset, decode, batch."""
