def bundle_card(path, trust):
    raise NotImplementedError
