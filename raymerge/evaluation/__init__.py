"""What a row of the comparison is worth: metrics, statistics, the comparison and its report."""
