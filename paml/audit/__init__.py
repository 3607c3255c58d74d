"""Label audit: lists labels to review, likely missing positives and likely wrong observed labels."""
