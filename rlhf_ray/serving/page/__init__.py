"""The page at / of the server: chat, compare and vote, results, playground; and the HTTP interface that it is made of.

`build.build_page` puts it in front of the front: it answers / and /page/..., and passes everything else on.
"""
