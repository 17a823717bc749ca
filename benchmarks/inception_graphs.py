"""A TensorFlow graph of Inception, made from weights under torch-fidelity's names; tests use it too."""

from unittest import mock

import numpy as np

_declared = []  # a declaration lasts as long as its object


def import_torch_fidelity():
    """torch-fidelity's module of the network, made importable beside a CPU-only torch.

    torchvision's published wheels register kernels for two operators that only their compiled part
    declares, and that part does not load without CUDA. Declaring the two lets it import; nothing
    here calls them.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
    from torch_fidelity import feature_extractor_inceptionv3

    return feature_extractor_inceptionv3


def inception_shapes(folder):
    """Shape of every entry of torch-fidelity's state dict; `folder` is for a file that it wants to read."""
    import torch

    network = import_torch_fidelity().FeatureExtractorInceptionV3
    torch.save({}, folder / "empty.pth")
    with mock.patch.object(network, "load_state_dict"):
        empty = network("shapes", ["2048"], feature_extractor_weights_path=str(folder / "empty.pth"))
    return {name: value.shape for name, value in empty.state_dict().items()}


def random_inception_state(shapes):
    """A state dict of random weights that keep activations of ordinary size; float32 tensors."""
    import torch

    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros((), dtype=torch.int64)
        elif name.endswith("running_var"):
            state[name] = 0.5 + torch.rand(shape, generator=generator)
        elif name.endswith("bn.weight"):
            state[name] = 1 + 0.1 * noise
        elif len(shape) == 1:
            state[name] = 0.1 * noise
        else:
            fan_in = int(np.prod(shape[1:]))
            state[name] = noise * (2 / fan_in) ** 0.5
    return state


def write_graph(state, path):
    """The network of `state` (names of torch-fidelity) as a TensorFlow graph with ADM's node names."""
    import tensorflow as tf

    nn = tf.nn
    weights = {name: value.numpy() for name, value in state.items()}
    graph = tf.compat.v1.Graph()

    def conv(x, name, stride=1, padding="SAME"):
        kernel = weights[f"{name}.conv.weight"].transpose(2, 3, 1, 0)
        x = nn.conv2d(x, tf.constant(kernel), stride, padding)
        mean, variance, offset, scale = (
            weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "bias", "weight")
        )
        return nn.relu(nn.batch_normalization(x, mean, variance, offset, scale, 1e-3))

    def chain(x, block, names, last_stride=1):
        for name in names[:-1]:
            x = conv(x, f"{block}.{name}")
        return conv(x, f"{block}.{names[-1]}", last_stride, "SAME" if last_stride == 1 else "VALID")

    def pool_branch(x, block, pool=nn.avg_pool2d):
        return conv(pool(x, 3, 1, "SAME"), f"{block}.branch_pool")

    def numbered(stem, *ends):
        return [f"{stem}_{end}" for end in ends]

    def block_a(x, block):
        return [
            conv(x, f"{block}.branch1x1"),
            chain(x, block, numbered("branch5x5", 1, 2)),
            chain(x, block, numbered("branch3x3dbl", 1, 2, 3)),
            pool_branch(x, block),
        ]

    def block_c(x, block):
        first = conv(x, f"{block}.branch1x1")
        if block == "Mixed_6d":
            first = tf.identity(first, name="mixed_6/conv")
        return [
            first,
            chain(x, block, numbered("branch7x7", 1, 2, 3)),
            chain(x, block, numbered("branch7x7dbl", 1, 2, 3, 4, 5)),
            pool_branch(x, block),
        ]

    def block_e(x, block, pool):
        middle = conv(x, f"{block}.branch3x3_1")
        double = chain(x, block, numbered("branch3x3dbl", 1, 2))
        return [
            conv(x, f"{block}.branch1x1"),
            *(conv(middle, f"{block}.branch3x3_2{end}") for end in "ab"),
            *(conv(double, f"{block}.branch3x3dbl_3{end}") for end in "ab"),
            pool_branch(x, block, pool),
        ]

    with graph.as_default():
        images = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3], name="ExpandDims")
        x = tf.compat.v1.image.resize_bilinear(images, [299, 299])
        x = (x - 128) * 0.0078125
        x = conv(x, "Conv2d_1a_3x3", 2, "VALID")
        x = conv(x, "Conv2d_2a_3x3", 1, "VALID")
        x = nn.max_pool2d(conv(x, "Conv2d_2b_3x3"), 3, 2, "VALID")
        x = conv(x, "Conv2d_3b_1x1")
        x = nn.max_pool2d(conv(x, "Conv2d_4a_3x3", 1, "VALID"), 3, 2, "VALID")
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = tf.concat(block_a(x, name), 3)
        double = chain(x, "Mixed_6a", numbered("branch3x3dbl", 1, 2, 3), 2)
        x = tf.concat([conv(x, "Mixed_6a.branch3x3", 2, "VALID"), double, nn.max_pool2d(x, 3, 2, "VALID")], 3)
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = tf.concat(block_c(x, name), 3)
        short = chain(x, "Mixed_7a", numbered("branch3x3", 1, 2), 2)
        long = chain(x, "Mixed_7a", numbered("branch7x7x3", 1, 2, 3, 4), 2)
        x = tf.concat([short, long, nn.max_pool2d(x, 3, 2, "VALID")], 3)
        x = tf.concat(block_e(x, "Mixed_7b", nn.avg_pool2d), 3)
        x = tf.concat(block_e(x, "Mixed_7c", nn.max_pool2d), 3)
        x = nn.avg_pool2d(x, 8, 1, "VALID", name="pool_3")
        classes = tf.constant(weights["fc.weight"].T)
        with tf.name_scope("softmax/logits/"):
            tf.linalg.matmul(tf.reshape(x, [-1, 2048]), classes, name="MatMul")
    path.write_bytes(graph.as_graph_def().SerializeToString())
    return path
