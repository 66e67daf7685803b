"""What on this machine, or on the cluster it joins, would break a run; each finding carries its remedy."""
