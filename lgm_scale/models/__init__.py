"""Networks. Nothing here knows Composer or torch.distributed.

Legend of shapes, used everywhere in the project:
    B  batch
    N  base tokens of an image (256 at 256x256)
    K  tokens after merging
    D  latent channels
    C  width of a transformer
    H  attention heads
Time: t = 0 is noise, t = 1 is data.
"""
