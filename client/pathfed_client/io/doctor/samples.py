"""Tiny slides with known pixels: 16 x 16 px, one native tile each, one for each way of compressing that is decoded directly.

The picture is 4 x 4 squares of random colours. Each slide was written once with imagecodecs and tifffile, and what libjpeg-turbo and
OpenJPEG make of it is stated by its SHA-256: a JPEG decoder that rounds, interpolates or guesses colours otherwise gives another one.
"""

import zlib
from base64 import b85decode
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SampleSlide:
    """One tiny slide.

    Attributes:
        name: how its tile is compressed.
        pixels: SHA-256 of its pixels, uint8 RGB (16, 16, 3), in hex digits.
        packed: the file, zlib in base 85.
    """

    name: str
    pixels: str
    packed: str = field(repr=False)

    def file(self) -> bytes:
        """The TIFF file."""
        return zlib.decompress(b85decode(self.packed))


#: Side of each sample, pixels.
SAMPLE_PX = 16
SAMPLES = (
    SampleSlide(
        "jpeg-rgb",
        "f2fbfb06ea837c1f9f9ad57726a20597d6a2fdffb0132e2a51b06d8731dbbfda",
        "c-r&y)MDUZU|<knU|?inV1%$37?IdajLZzoK>8dIGXvQmadsePgR+@`SQN?zsgq)41+%XJu{4x@2Z&{$YCu>6iS2}BmopOE1<F<c60T78R-gq!Ow3?A8G%"
        "rQiIss3$bP~A0UTfmGZ}^%p!9zz-9Uhk4F2Ev|A0Zj%gxgb7$^`+8UEj9aAsg;Vgex`U;!dl4pvqc7FI5Hb~X+kE*>6kE^cmKJ|O{KK0!WiZUHd?L17V5Q"
        "BfX#aS1UI2_X?t5s)E_%s@RXtemW@oFcs3ydorn{|6WZIe?)hz|1Jfz$D1XEXer(2!lM(ove&t0P_YT6VQ!p>>Qk2+&~3e1wgUN%*4VBay3x47AViaBFHM"
        "FXz0i$9GJ+iR48K9IB_9|veU+cqCpows2C>|HF0u@iAzXIsj8`KXlj|5nweWzS~<J8y19FJdIg7shJ{B&MkS}Drln_OW)+u|mX%jjRyDV@wzYS3c1@Z*W$"
        "Lu)GiJ_Ow0OzVWy@ErT(xQQmaW^i@7THP(BUITj~zd8^3<ivSFT>We&gn?hmRgVdHU@6i<hrHe)|07>$mSee*OaaixHRrVF0VYfPuis#KOYN!VdBmBU3p@"
        "fglU3q9L1*V<3BCp|FxsBZr97#DyCVaw;1KeGpA5y2vG_V)9V+BgkuDpAqM=CbE16_ZY%ow-|Vs8G(_<EXZKbF#X%?AE*B_aOD3{uK%e1JN;JO<^K%&)@E"
        "-%?Z099`~K4U;>SPszlzzvWAFQKYq##-^?Uy9JE}+jGu+yD|GUhdJ^Qo1?>GM*o_wcHx+d#CL)-0t7ymPKn*ULp|Doq+{im<r{xfX(yS)6jV9xDt_1`w{-"
        ")8xrLGnkt@_&Yo{5Sh6zxJ;wE_w3w$@V$#>*}?m*M9lWV5#B#JMKS2`t;}3fA9AG4S(GK?f%sN3_||ur_TS``|e!fzXM;^zg*Ar2WVZW-Om3EocFHZ`fdN"
        "S`gC4g{jYNE`?F6cf4k3+S-(R5)~w(4`ETlXo<8}u{&@B0pHX-7m$e^Wf1CNA(EGRiKbGt}`K@06UsCk<yu1GyeA?{ZzmA*US>gYqNj~`dzMWssXI{QpRI"
        "TU#>*v|CZ|!&I#cjX*c!Ry?{5N*_Kir=`-~MO+*0uG&ihj@ke-i*n^p~O",
    ),
    SampleSlide(
        "jpeg-ycbcr",
        "407e792fc41b333c1db9ccc9a901dd6b11b6b27f07134cc335b06ebec0da7d11",
        "c-r&y)MDUZU|<knU|?inV1%$37?IdajLZzoK>8dIGXvQmadsePgR<FxSQN?zsgq)41+%XJu{4x@2Z&{$YCu>6iS2}BmopOE1<F<c60T5oInV+jCT0dEuwF"
        "(65hhl!{ZAMmfCCI+Cc`iTl>QH;8wl``!T%foA20}bxp}$)0|jC!!~fe1&J4^<OdtdVEI`D{!OF_Q!pg<Y&c?yR#lyqR#m&vjCnUhjC&<UmEg&W!C@dl>D"
        "$2tzE+Hl&AtWLy0y2b=8K{Sam6Mf~Q-qhBSA=Bn{{Vv^2Qah*m>C5bm;@P_1sVSzVUP#9la&z+VBTP40=kinor9B$8>nEb04P?OnOK-Xt_I510_7Q41X+a"
        "?4ISBp0~6Vm3Pp?>CobercG`GQH0a_772~9$CQdFfaS2H&RW)@DO)V2sGjj_|D`yv1H+K(Dui%i-u<(e;sN|H?wDgS3tm2Z=vhs?`s^*r~w)T$Bu1S-pOr"
        "17;#>`oZ7B5-4Z25|nt2S-kvUS_`9Xod&I(+2lvEwIBp1O4T%GGPvZ`{1~@X_NZPoF)1@$%KjPoKYh{r3IG&tD*aF#;1H3}E#aFc27-SXh`@*g^hcWGV+K"
        "5M*IhG-MNU3}jC%6jm~7<PdS1xNze^PG#eu528s$7rDe#OdhI!1bGeYGvYkfM3&Fs9z*!+76T76BQWxq1sUuaesv$)FaDol<G!Q+8HDCrpSk~^LEpNtcmE"
        "sts9$no@we)3zxnj(=lioSZ~U?DRQ;NteC^Nug&%tVGyGyZ|M>p=oaFxu*W>JD|1)IVfAi_j_usqa@6WM6a{r^q-}Ue6)_%>dU7vaOt^VH|QFrE*@AuArX"
        "U}4vdH;vw{%!jo&H9~xYft~r`cL29ezt!(^IUn|R2jpA{~2!9-TwaP&Yk^fw~Om5zuSrT82x8>`#$k~QBiTp-uI`U?H1do@F(CuLo4Su{vXro^ZqkrSI+-"
        "*|INSfsoVcfzdPUfw#55cKi^F6|Ie`H@ABXJ`nvn>e&7FHJlT)`QUBM^xBorA@mnr_>-oC6{CCH$J^j4*SH%CD06Y?KZ~",
    ),
    SampleSlide(
        "jpeg-ycbcr-420",
        "a4448bd4da511cabb776d9e44cbff899ed8060a307d5bbc948a5e2a412685251",
        "c-r&y)MDUZU|<knU|?inV1%$37?IdajLZzoK>8dIGXvQmadsePgR<FxSQN?zsgq)41+%XJu{4x@2Z&{$YCu>6iS2}BmopOE1<F<c60T6TEYJcWCT0dEkh_"
        "3Tgozbw{}ToX-~dCI$uP_SrT;_e1_FF!@c+jD2MhvUZk}$yKmkbuiT}45oEeyzm_P^!Sb&I?gO!zqg_Vn)osENsi-(7si<_I5Pe_25PmqtBTR==eP*_A%R"
        "FsEbTtZAlLP$hZ1Y`&!Gf)o;D<>-}rwA`MuL#ND{{aR;4q#{rFf%GKFbOg;3o`yc!XOWHCo3Zuz`Vi81au=CI|nBhH&DS=0Z^<mGqEs(Tn&`11<Et92(k("
        "(8alEG2PU#B6^a-&PF%>L?6mQqXwbzED#l4gO`Kd};u4Zls%q*Qnp!5NX66=_R?aT2ZtfnQUcn)uVc`*xQOPN(Y3Ui6S;Zx#W#tu>Rn0A}ZS5VMU6UqHnL"
        "2IyjG40*Enc#8+42=DS8dw7W$U)>J9h3mboj{8W5-XNJay^vm8;jT-?(|};iJb-o<4j2;^nK4pFV&2`tAFVpT9u<Vgx2Y7{KZ;L7=~wSXh`@*g^hcWGV+K"
        "5M*IhG-MNU3}jC%6jm~7<PdS1xNze^PG#eu528s$7rDe#OdhI!1bGeYGvYkfM3&Fs9z*!+76T76BQWxq1sUuaesv$)FaDol<G!Q+8HDCrpSk~^LEpNtcmE"
        "sts2^_s8U8Y-e|&#_o8f<k*Xs*^DE{{Q&v1zM@7DheBG+%%U42r2`ai?;?fEnRGx(e<-u-2Dyg;2s{h^lM?0>xNx7TmobN*-kw|ebUxBs1fcYfyEp7OKVG"
        "ARZ(a%6e#e>YWsYx3jgoA-N4`n5KH-aql1jOKLzHjB1>OcCp<EY?K_J=wnPTfvn1`zx*L&YqrKdVbrA|2F}7CN5Y",
    ),
    SampleSlide(
        "jpeg-2000",
        "20eb853d7f6d60f3ab1edfc970af84366b3481bcf705d87819ce65e691249960",
        "c-r&y)MDUZU|`^9U|?inU<9%RfS3`9&BVyezzn1h0WmX>4HAFbz`(!;WitUWA0rdkloLQK3Ka+Gkz!;8vo8R#G?aY<h-IK^Kv)Bb?Sy2nGZNbc%6<UEu28"
        "lg$YLPi07J)u)S}FM1-MBt{NMk7AcH<wp#T)a04krEoskiO{s%GefWv^11!&X%7zTC+2M>>c|0xWr42;f2sfi`2DGEuI3jPJDd0qjo?h0k8Ma7x<c?w2)r"
        "g|p-Coph<%wxO_)I0fp;|I@=6MoIpo~ZCVlyiNoFmIFfPqR-74|IJFgd9F#t-9Z!@$HflHcOAX9L@eUH+jq&ZyQZyUAiwe&zzUdXX%mqO$yrDk0%T5yz_p"
        "YpZ-=g$3GtY+{|JdGtVzB>nazM{@<LD@pGDthl}}H@5#o@%F&yaZjxGfK0H}kNLM#0T`%{NWo+4@kN>3%wDtFO<fdId{`)R>f0_E*R>AohE6arE#AiiV2r"
        "<m-EZX@#@#zzVDXv{>J&$EB4Ggif%HLzxbo|48kqZeN)<rrmovxkg3qSlyvVTh!{|X1ie|F{FO9iJq{u%b5d_$V7g!t`=H_by1cYD6K@3XtDude;6z?|=M"
        "?MA%~EBK`si3n-)OFl07P`#XKZ%}OC(X{_s{O1o;)iHng?c(5Tym#UOgM;bS--FmY9sVRspDYh~aWnO#Vx@}j=J_EeRuPM?C!`wxGTN!K{M93+&r)-w#Tz"
        "YeSvgpjuleoi6Fud5@0FtyeV^VseaP0-|NMbEu(1t_f&Npj?cZAv{9msx_I`Jb!zP<$-ES0rvv8fUeEF?j_4|y2hw_T2?Uk3FWW*^E@Okwrr^mJXmug*mJ"
        "L$w*a|MGvJt|-8W^DWY%U`?m)uXuh|2F~MgajD",
    ),
)
