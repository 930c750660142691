"""From an opened checkpoint to a model on the device, and back.

* `load`: `load_checkpoint` reads any opened checkpoint as a `LoadedModel`.
* `loaded_model`: `LoadedModel`, and its parameter tree by path.
* `weight_map`: where each published tensor lies in that tree, and whether a checkpoint has the tensors of its config.
* `quantized_leaves`: which leaves are packed, and how one is put together.
* `cpu_layout`: weights in the order in which a CPU multiplies them fastest.
* `random_init`: models with random weights.
* `export`: the published tensors of a model.
* `orbax_io`: parameter trees on disk as Orbax checkpoints; `orbax_save` and `orbax_restore`: whole models in that form.
"""
