from torchvision.transforms import InterpolationMode

__all__ = ["InterpolationMode"]


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def text_only(*arguments, **options):
        raise NotImplementedError(f"torchvision.transforms.functional.{name} is a stub: text only")

    return text_only
