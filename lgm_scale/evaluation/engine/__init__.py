"""Results over images, computed in chunks that any number of processes share, and kept in files.

Knows nothing of networks, metrics or images. Why it is built of files: a sweep of 50 000 images
per cell takes hours, on machines that are taken away at any time. Whatever is finished must count,
whoever made it, and a number must have the same bits as if one process had made all. So work is
cut at fixed image ranges (`chunks`), dealt over ranks and jobs (`parts`), summed in the order of
the images (`statistics`), and what is done is recognised by the hash of its protocol (`rows`).
"""
