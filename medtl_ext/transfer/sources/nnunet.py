def nnunet_card(path):
    raise NotImplementedError
