"""From files to batches of uint8 pixels on the host.

`sources` opens a split of a data set, `decode` turns one file's bytes into pixels, `geometry` cuts
and resizes views, `pipeline` puts them together into batches that depend on the seed and the
position in the data alone. The other way, `archives` reads what people have, and `tfds_writer`
makes of it what `sources` opens. Nothing here touches a device.
"""
