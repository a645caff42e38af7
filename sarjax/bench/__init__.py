"""Measurements that a user repeats: `sarjax bench`."""
