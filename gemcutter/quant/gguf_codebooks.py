"""The codebooks of GGUF's IQ types: which patterns of four or eight neighbouring magnitudes their codes stand for.

Owns the codebooks. Each is a set of points of a small grid, in ascending order if their columns are digits of a number, the
first column the lowest: so a bit for each point of the grid, in that order, says which are in it. Refuses to know signs, scales
and what a digit stands for. Source: ggml's tables, which `tests/unit/test_quant_gguf_blocks.py` compares. Read
`gguf_blocks_iq.py` for their use.
"""

from __future__ import annotations

import base64
import zlib
from functools import cache

import torch
from torch import Tensor

_GRIDS = {
    "IQ1": (3, 8),
    "IQ2_XXS": (3, 8),
    "IQ2_XS": (3, 8),
    "IQ2_S": (3, 8),
    "IQ3_XXS": (8, 4),
    "IQ3_S": (8, 4),
}  # digits, columns
# The bits of all of them one after the other, each from a byte's lowest bit on, deflated.
_BITS = (
    b"c-nPWO^h5z6@FDzp_+EEs+VrX;#AvShfX`PjBkWXwKXFd`_dCli@Q%Ipa^m1r`_y^ac_`f3j~5oyRnmTJ92^#$c!aN$|*z~K-_Y$z=sI04@kLyj6`@<)jd"
    b"74IIWr8nR<WUd-c6nHTj8Pucl|GV)C`c>#AzLA`%tsWkIRNlM^AYX{qMNK$P_tl6ro>_1<icKm=a<Mp+AuR@?I;3(&keEq+ytBEgklPn|oPiwSw@gIZNDK"
    b"(e!F8}aB}A>tS?R@}yFQ7G>>;t$J(`smJ;=1%+a51t$>@0UmKMaz%=dh{BNAX1BJ>6KJKa{h14HzIYify?@GTg4(Gh%hYGXtF)qs|7v2cv<b1YKAZxC4P|"
    b"wG!gd}Wl^7_N|eo|hQ_xOv4@{ei-`t<u!gf!n2;AssLDiKKOJyPId<SFRc!)l>vz?ic(J_RF1`n)CukheT`1vPQ6IdQv>&MbWpwcI+xz>kEw17B@9$UR=M"
    b"r^pSI1Q%TJ_<dny7jA*Y!UZ6euK%IjExEZ<=^n7v&jm`QYC2zfYR_WFsmsK4{?j8T#DQ8wU^nd2(^;XAge#<mtbD{Qf6DTt58vf4=(J`!77*di?h)lI??|"
    b"yREppI8xsEY`OFJCk4Cs(xp!q-i?!hDT_z#7SJ;B-co-oue@2t(7+qTm!T8_zFW2Jefrjes{V);-}&XKKi_>UOL?k&7>9qk$-pypP=Z`nW&8DIbY{066~~"
    b"}zF4D`v7z?%iPHA_!RdM@MZ_Dm7uZ5uvQMA@g1alCLc(r=%UfUL+yz<e9(Y6>Ht5KywWYp`PXp^J>&sc3Qz&d=S=B0NGx1ep>>b-sHB^aVCS}ztc+?vy<e"
    b"sCndC#vOzyO{Egf8S}<EAge@*QY-zJc>+s^&%39w(ZIGpt)5yLP%9t5tK*WE_;@ux4sDHTPkjX{L;AFWsa0C-}zJl0LJo`>Y$-eo*TuF1Mn|Q3^x|kBAoA"
    b"tdF*L{E0{7h4oMycxg4h{uwV=leJ~9HXfU4uGO1G^NWgT4>nP^<&HxA)l@!;5z$&_zwUW?10h1Edm=BEL2W_nIAx=>;jV_&)?A|tndpI#7gTwEathw%7o3"
    b"DgBPtGXo^+2a6)x9?BY&w~FIRp$g9|tePYDkGGgLLL&FxWf%T3R(}fUYtnFr*BU49+F#i(=n$Y%wxoP1uI*fKih*k8GvGBpWd6b+LU?t42DJ9@H#If5<X;"
    b"X6|b_9DYnSyRBe)Ww>%+X`_cEZA4phvXRz$gdsg5`!cNKhQ5aSnN}N*{2bW|$>C}~<MT5g_W5dgo=@{h8cxV8&$CG?k*%{S_6h?+ATy%SFbG9RWX5a}C3o"
    b"!0xgWTO=r}G7LPi{6X89DYbng&F8DxH6PUCQ5Yo^maFS{r1Bj?cdl)nL9cc`61V3{;gyRIWnahzJ_^-bf1q_3S!iH#zApSBN(E&kZ0Z1d_;hB2m>lHMT}%"
    b"JvgMk=t->3Z>=HG=y|fQyYKaO;=u<G6TNJYtXj5(v&B43vz9sFsz2w9Y3VrAc^j3C=IM^lTnT|M6YqdwY5CVJ0Kf{X8kzQAtxa-ezTBty$d!AQ{^<6*{0E"
    b"J{M19UqqZrwnXHEyD;aauAg<lzCcV+g*bD=?4l+30A#8K94D%Pc#n#4>t)&k7C=52I%Vsf6@JY7?9cn)OMYyhM@{s$v;dmbKFhGuHIRoFve-l&)XOn4`=K"
    b";P9{ZTXxEL+3eSRqX`&)FD7X2%1`-Kl|1GeytgG{Al|A@Tsv<TPa*EF}krMr0iZ+))zyamtJcGj<~BW^Kpx*)*J{oDm;p8MdXfk}x&>%3+LIY&i7$qstom"
    b"2t(THgsZl(9g2TU)0mt?yp<qA-XTmwW>Pk|^4tvraH1^j5uyVbI1wA>goaG^TZ0ZmYX$$8a$qMx&{?e<LI>Waj3PUE2ZwH2Sbj}HjtI519Je);1_ra7A=7"
    b"n-(#lrdA#F9>(2*N7ax($vgdfa&oHa0U;BgrEVP}QA?03_pPnj4|wwh2zWZaO|d15_t!<9)cJ1e^>vL8H-vCpWXFIQ=s;Z24+hJT3p$ljUk4|du2sSey|o"
    b"OTXLH*pW0FS-Z1HUu;YNLQw?;uKe6k4K#1qzWmo@aC>cuAGs8LKYC0u&T4NmQz3x1&@1SVW>)7GkTobLCb+q6FORjwr31gYw*l6_a-JjB-U<Dc*zTbO4Jp"
    b">xABCDRbaFsK~GyCK)Hwhm5pbL=NV&zlo~6Sc!4Xa0k3S*8k|Vj`Bp%U_wlu%OE8@jqxI@0i0omkhMeNVWTy6T(7l1Zrm!vo5bK;dwe^cef6^I(8UNJ1i`"
    b"7_7*G~d9>}Utxxm&DeL3fogX`11_f=jI?A4<1zO1=H9<Km{ruRVYKN+cm-zx`(9-|%20B7R=-A|mrGHlpUNn1}|n&>p(O>W28;?9TJI`74l7cEP73q(Dk;"
    b"_-v#IyEZC)R3vc#-Wc_))Iz>$Nsc^GMt(c5c*2Vp`IVh5hVpCRU8Zx`Iza=EVY`$t+QH==Nm)SzkUirBEfv*7m`iTUlAlvS6X}^VU`!Z7C5As0sjvp(EPB"
    b"OX2$U;^r?{{rH1WX^+-FxAGLP(fY+E2%y=^K;f!8N&2zR(hLvLDJD`pDst~A>~1THb3!Breq39~e2go@NueivCM@h9~b{v2_aS8al>8Z+pJR$^AoVSBm1P"
    b"fDg3A(D0*Wj2z*sJlw3egivSS8@87D-T1C#`t|J#cZgJv14#VqQC94{{BqYN$@|?P3i;"
)


@cache
def codebook(name: str) -> Tensor:
    """Return the points that codes stand for, as digits: uint8 [codes, columns]."""
    bits, start = zlib.decompress(base64.b85decode(_BITS)), 0
    for each, (digits, columns) in _GRIDS.items():
        points = digits**columns
        nbytes = -(-points // 8)
        if each == name:
            own = torch.frombuffer(bytearray(bits[start : start + nbytes]), dtype=torch.uint8)
            numbers = (own.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten().nonzero()
            return (numbers // digits ** torch.arange(columns) % digits).to(torch.uint8)
        start += nbytes
    raise KeyError(name)
