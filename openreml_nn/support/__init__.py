"""What every room uses: the two errors, checks of arguments, files written whole, objects of a config."""
