"""`rlhf-ray bench ...`: measurements that anyone can repeat, each as a ratio to a yardstick measured in the same run."""
