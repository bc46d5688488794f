"""What is kept for a backward pass."""

from torch.autograd.graph import saved_tensors_hooks


class Saved(saved_tensors_hooks):
    """Counts what autograd saves in its `with`, each storage once, those of `known` tensors not."""

    def __init__(self, known):
        super().__init__(self.count, lambda tensor: tensor)
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._new = {}

    def __enter__(self):
        super().__enter__()
        return self

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._new[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self):
        return sum(self._new.values())
