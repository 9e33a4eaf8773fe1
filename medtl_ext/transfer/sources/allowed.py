import pydoc
from medtl_ext._validation import InputError


def built_network(definition, folder="", trust=False):
    t = definition["_target_"]
    path = t if "." in t else f"monai.networks.nets.{t}"
    if ".py:" in t:
        import importlib.util, pathlib

        f, c = t.split(":")
        p = pathlib.Path(folder) / f
        spec = importlib.util.spec_from_file_location("x", p)
        m = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(m)
        cls = getattr(m, c)
    else:
        cls = pydoc.locate(path)
    return cls(**{k: v for k, v in definition.items() if k != "_target_"})


def transforms_of(pre, keys=("image", "label")):
    import monai.transforms as mt

    out = []
    for p in pre:
        d = {k: v for k, v in p.items() if k != "_target_"}
        cls = getattr(mt, p["_target_"])
        if p["_target_"] in ("Resized", "Spacingd"):
            d["mode"] = [d.get("mode", "bilinear"), "nearest"][: len(keys)]
            out.append(cls(keys=keys, **d))
        elif "Pad" in p["_target_"] or "Crop" in p["_target_"] or p["_target_"] == "Orientationd":
            out.append(cls(keys=keys, **d))
        else:
            out.append(cls(keys="image", **d))
    return out
