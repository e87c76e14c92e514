"""One rank of a tensor-parallel language model, measured on a single GPU."""
