"""What each error code means, and what to do about it: the words behind `docs/errors/`.

Kept apart from errors.py so that raising an error costs no text, and so that the two can be compared: a test holds that every code has an
entry. After a change here run `make reference`, which writes the pages again.
"""

from dataclasses import dataclass
from typing import Final, Literal

from pathfed_common.errors import ErrorCode as Code

#: Who can act on it: the hospital's IT, the consortium's operator, or either.
Audience = Literal["site", "operator", "both"]


@dataclass(frozen=True)
class CatalogEntry:
    """One code's page.

    Attributes:
        title: a few words, without the code.
        meaning: what has happened, what it says about the data or the run, and what pathfed has done about it already.
        remedy: what to do, the likeliest cause first.
        audience: who can act on it.
    """

    title: str
    meaning: str
    remedy: str
    audience: Audience


_PLANS: dict[Code, CatalogEntry] = {
    Code.PLAN_UNREADABLE: CatalogEntry(
        "The plan cannot be read",
        "The plan's file is missing, is not UTF-8, or is not TOML; or the bytes of a signed plan are not JSON. Nothing was stored.",
        "Correct the file at the line that the message names. Start from one of the ready plans under `deploy/` if in doubt. A "
        "signed plan is never edited: ask the operator for it again.",
        "operator",
    ),
    Code.PLAN_UNKNOWN_KEY: CatalogEntry(
        "The plan holds an unknown key",
        "A key is not one that plans have. A misspelt key would silently leave a default in force, so it is refused, and the "
        "whole plan with it.",
        "Compare the key with the [plan reference](../reference/plan.md). A plan written for a newer pathfed needs that version "
        "at the server and at every site.",
        "operator",
    ),
    Code.PLAN_WRONG_TYPE: CatalogEntry(
        "A plan value has the wrong type",
        "A value is of another type than its key takes (text in place of a number, say), or a required key is missing. Nothing is"
        " converted silently.",
        "Write the value as the [plan reference](../reference/plan.md) gives it; `4` is a whole number, `4.0` is not, and text "
        "stands in quotes.",
        "operator",
    ),
    Code.PLAN_OUT_OF_BOUNDS: CatalogEntry(
        "A plan value is out of bounds",
        "A value lies outside the range its key allows, such as a noise multiplier of 0, which would mean no privacy at all. The "
        "message holds the key, the value and the bound.",
        "Choose a value inside the bound. The bounds and their reasons are in the [plan reference](../reference/plan.md).",
        "operator",
    ),
    Code.PLAN_IMPOSSIBLE: CatalogEntry(
        "Plan values do not fit together",
        "Each value is allowed by itself, but not in this combination: a tile side that is no multiple of the patch size, a reply"
        " slot beyond the deadline, or more expected patients a step than a site declares.",
        "The message names both keys. If a site declares fewer patients than `privacy.expected_patients`, lower that value or "
        "leave the site out: a sampling rate above 1 does not exist.",
        "operator",
    ),
    Code.PLAN_NOT_AUTHENTIC: CatalogEntry(
        "The plan is not authentic",
        "The plan's bytes are not in canonical form, its digest is not the one named, or the signature is not that of the server "
        "this site knows. The site has not stored it.",
        "Ask the operator for the signed plan again, and compare its digest over a second channel (telephone, signed mail). If it"
        " still fails, treat it as tampering and do not approve it.",
        "both",
    ),
    Code.CHECKPOINT_UNREADABLE: CatalogEntry(
        "The checkpoint is no safetensors file",
        "The file given to `pathfed-server encoder import` is damaged, is of another format, or is a pickle (`.bin`, `.pt`, `.pth`). A "
        "pickle can run any code when it is opened, so pathfed never opens one. Nothing was stored.",
        "Take the publisher's `.safetensors` file, and compare its checksum. Where only a pickle is published, convert it on a machine"
        " that holds nothing else, as the [operators' guide](../how-to/operators.md) says.",
        "operator",
    ),
    Code.CHECKPOINT_UNFIT: CatalogEntry(
        "The checkpoint is not this encoder",
        "Parameters of the preset are missing from the checkpoint or have other shapes there, the whole encoder lies in it under "
        "several prefixes, or it holds numbers that are not finite. The report names each tensor with both shapes. Nothing was stored.",
        "Choose the preset that the encoder was published with (the [operators' guide](../how-to/operators.md) has a table); say with "
        "`--prefix` which copy is meant, such as `teacher.backbone.`; take the publisher's original file where numbers are not finite.",
        "operator",
    ),
    Code.CHECKPOINT_UNAVAILABLE: CatalogEntry(
        "The plan's checkpoint cannot be used here",
        "The plan's `encoder.init_from` names a checkpoint that this server does not have, that has changed on its disk, or that belongs"
        " to another preset or another tile size. The plan was not published, or the run not started.",
        "Import the published file with `pathfed-server encoder import`, with the plan's preset and tile size, and let "
        "`encoder.init_from` name the digest it prints. A wanted digest that the import does not give means another file.",
        "operator",
    ),
}

_SITE_DATA: dict[Code, CatalogEntry] = {
    Code.SLIDE_FOLDER_EMPTY: CatalogEntry(
        "No slide folder, or no slide in it",
        "The slide folder does not exist, cannot be listed, or holds no file that looks like a slide.",
        "Check the path in the site's settings, that the network share is mounted, and that the service's user may read it.",
        "site",
    ),
    Code.PATIENT_LIST_UNREADABLE: CatalogEntry(
        "The patient list cannot be read",
        "The CSV that maps slides to patients is missing, is in no known encoding, lacks a column for slide or patient, or is no CSV from "
        "some line on. Without it no slide belongs to anybody, so nothing can be trained on.",
        "The message names the column or the line. Name the columns in `[patient_list]` of `site.toml`, or export the list again. "
        "`pathfed-site patients` shows how a list is read, without changing anything.",
        "site",
    ),
    Code.SLIDE_LISTED_TWICE: CatalogEntry(
        "A slide is listed for two patients",
        "One slide stands in the patient list with different patients. If it counted for two patients, taking out one of them would not "
        "take out all that depends on that person, and the privacy guarantee would not hold. The slide is out; all others are scanned, "
        "and the command ends with this error so that nobody overlooks it. Two lines that say the same are one.",
        "Find out whose slide it is and leave one row. If one slide truly carries tissue of two people, leave it out.",
        "site",
    ),
    Code.SLIDE_UNMAPPED: CatalogEntry(
        "A slide belongs to no patient",
        "The slide is in the folder but not in the patient list. It is listed as refused and is never trained on.",
        "Add a row for it to the patient list and scan again, or leave it.",
        "site",
    ),
    Code.SLIDE_UNOPENABLE: CatalogEntry(
        "A slide does not open",
        "OpenSlide does not recognise the file, or the file is broken. The slide is set aside; all others go on.",
        "Check that the copy is complete (size, checksum) and that its format is one OpenSlide reads. Copy it again and scan again.",
        "site",
    ),
    Code.SLIDE_UNREADABLE: CatalogEntry(
        "A slide opens, but does not read",
        "Reading pixels failed, or gave constant or transparent tiles, which is how damaged slides often look. Such tiles are "
        "never replaced by white: the slide is set aside.",
        "Look at the slide in a viewer. Copy it again from the scanner or the archive, then scan again.",
        "site",
    ),
    Code.SLIDE_MPP_UNUSABLE: CatalogEntry(
        "A slide has no usable resolution",
        "The slide states no micrometres per pixel (mpp), states an absurd value, or is coarser than the plan's mpp allows. A "
        "guess would mix scales, so the slide is set aside.",
        "Where the scanner's true resolution is known, have the file's metadata corrected, or convert the slide with it. A slide "
        "scanned too coarsely cannot serve this plan.",
        "site",
    ),
    Code.SLIDE_NOT_BRIGHTFIELD: CatalogEntry(
        "A slide is not a brightfield slide",
        "The background is not bright: a fluorescence image, an inverted one, or no slide at all. Tissue cannot be told from "
        "glass, so it is set aside.",
        "Leave it out of the folder. If it is an ordinary stained slide, look at it in a viewer: a wrong colour profile may have "
        "inverted it.",
        "site",
    ),
    Code.SLIDE_WITHOUT_TISSUE: CatalogEntry(
        "A slide shows no tissue",
        "No tile reaches the plan's `cohort.tissue_share`. The slide is valid but contributes nothing.",
        "Nothing needs doing for empty or faint slides. If many slides end here, look at one, and ask the operator whether the "
        "plan's tissue share suits your material.",
        "site",
    ),
    Code.PATIENT_WITHOUT_TILE: CatalogEntry(
        "A patient has no usable tile",
        "All slides of the patient were refused or show no tissue. The patient is not part of the cohort.",
        "See the reason of each slide with `pathfed-site scan --json`; mend those you can and scan again.",
        "site",
    ),
    Code.COHORT_EMPTY: CatalogEntry(
        "No patient is left",
        "After the scan, no patient has a usable tile. There is nothing this site could contribute.",
        "The scan lists a code for every slide. Many `PF204` point to a patient list that does not fit the folder; many `PF207` "
        "to a plan at another resolution than your scanner's.",
        "site",
    ),
    Code.SLIDE_MISSING: CatalogEntry(
        "A listed slide is not there",
        "The patient list names a slide that is not in the slide folder, or one that was scanned before is gone.",
        "Check whether the share is mounted in full. Remove the row if the slide was withdrawn.",
        "site",
    ),
    Code.NOT_SCANNED: CatalogEntry(
        "The slides are not scanned for this plan",
        "The site database holds no tiles laid for this plan's cohort rules (mpp, tile size, tissue share).",
        "Run `pathfed-site scan` with the plan. A stopped scan resumes where it was.",
        "site",
    ),
    Code.SLIDE_OUT_OF_FOCUS: CatalogEntry(
        "A slide is out of focus",
        "Too few of the tiles that were sampled reach the plan's `cohort.quality.min_sharpness`. The slide is set aside.",
        "Look at its tiles with `pathfed-site inspect`, which gives the sharpness of each. Scan the glass slide again if they are blurred. "
        "If they look sharp, tell the operator the values: the plan's threshold may not suit your scanner.",
        "both",
    ),
    Code.SLIDE_FILTERED: CatalogEntry(
        "The quality filters left no tile of a slide",
        "The slide shows tissue, but pen marks or folds were found on all of its tiles. The message says which filter removed how many.",
        "Look at the overlay with `pathfed-site inspect`. If the filter is right, clean the glass and scan it again. If it is wrong, and "
        "above all if it takes many slides, tell the operator: the filters' thresholds are in the plan's `[cohort.quality]`.",
        "both",
    ),
    Code.SLIDE_FOLDER_UNREACHABLE: CatalogEntry(
        "A slide folder is out of reach",
        "One of the slide folders, or a folder inside it, cannot be listed, or is empty though it held slides before, as a mount "
        "point is when the share is away. Nothing was concluded about the slides there: they stay as they were; the rest was scanned.",
        "Mount the share again, or give the service's user the right to read it, and scan again. A folder that was emptied on purpose: "
        "take it out of `site.toml`.",
        "site",
    ),
    Code.SLIDE_FOLDERS_OVERLAP: CatalogEntry(
        "Slide folders overlap",
        "Two of the slide folders are the same, or one lies inside the other. Every slide there would be found twice.",
        "Name the outer folder only: folders are searched with everything below them.",
        "site",
    ),
    Code.SLIDE_DUPLICATE: CatalogEntry(
        "A slide is there twice",
        "Another slide of the same patient has the same content. One of the two is used, the one whose path comes first; this one is not.",
        "Nothing needs doing. Remove the copy if it was not meant to be there.",
        "site",
    ),
    Code.SLIDE_SHARED: CatalogEntry(
        "The same content is listed for different patients",
        "Two files hold the same slide, and the patient list gives them to different patients. One of the lines is wrong, and nobody "
        "but the hospital knows which. If such a slide counted, taking out one patient would not take out all that depends on that "
        "person, so all of them are left out.",
        "Find out whose slide it is, and remove the wrong line or the wrong copy. Then scan again.",
        "site",
    ),
    Code.SLIDE_CRASHED: CatalogEntry(
        "A slide ends the process that reads it",
        "The process that read the slide ended: its decoder crashed, or it took more memory than there is. That cost this slide only. "
        "It is tried again at the next scans, three times in all.",
        "Look at the slide in a viewer on a machine that may crash, and copy it again from the scanner. A new copy gets new tries. "
        "If many slides end so, the machine has too little memory: use fewer `--workers`.",
        "site",
    ),
    Code.SLIDE_TIMEOUT: CatalogEntry(
        "Reading a slide takes too long",
        "The slide was not read within the time limit, and the process that read it was ended. It is tried again at the next scans, "
        "three times in all.",
        "If the share is slow, give more time with `--slide-timeout`. If only this slide is slow, copy it "
        "again; a new copy gets new tries.",
        "site",
    ),
    Code.SLIDE_AMBIGUOUS: CatalogEntry(
        "A line of the patient list fits several slides",
        "The line names a slide by a file name, with or without its suffix, that several slides of the folder have. Nobody can say which "
        "one is meant, so the line counts for none of them.",
        "Name the slide by its path below the slide folder.",
        "site",
    ),
    Code.SLIDE_LINES_CONFLICT: CatalogEntry(
        "Lines about one slide contradict each other",
        "Two lines of the patient list give one slide, or one scanner, different values of the same column, such as two organs or two "
        "resolutions. The slides concerned are out; all others go on.",
        "Correct the lines that the scan names and scan again.",
        "site",
    ),
    Code.LIST_LINE_UNUSABLE: CatalogEntry(
        "A line of the patient list cannot be used",
        "The line has no slide or no patient, more fields than the header, a patient's number that a spreadsheet has rounded, a day that "
        "cannot be read, or an implausible resolution (mpp). Its slide is out; all others go on.",
        "Correct the lines that the scan names. Days are written YYYY-MM-DD. A column that is not needed can be switched off in "
        "`[patient_list]` of `site.toml`.",
        "site",
    ),
    Code.SLIDE_OUTSIDE_RULES: CatalogEntry(
        "A slide is outside the plan's cohort rules",
        "The plan includes or excludes slides by attributes such as organ or stain (`cohort.include`, `cohort.exclude`), and this slide "
        "does not fit, or its attribute is not known. It is not part of this plan's cohort.",
        "Nothing needs doing where the slide is not meant. Where the attribute is missing, add its column to the patient list and scan "
        "again; slides are not read again for it.",
        "site",
    ),
    Code.SLIDE_WITHDRAWN: CatalogEntry(
        "A slide was withdrawn",
        "The slide, or its patient, was withdrawn with `pathfed-site withdraw`. It is never trained on again, whatever later lists say.",
        "Nothing. A withdrawal is for good.",
        "site",
    ),
    Code.WITHDRAWAL_UNKNOWN: CatalogEntry(
        "A withdrawal names what is not known here",
        "A line given to `pathfed-site withdraw` fits no patient or slide of this site, or fits several slides. Nothing was withdrawn, not "
        "even what the other lines name.",
        "Correct the lines that are named and give all of them again. Slides are named as in the patient list.",
        "site",
    ),
}

_PRIVACY: dict[Code, CatalogEntry] = {
    Code.BUDGET_SPENT: CatalogEntry(
        "The hospital's privacy budget is spent",
        "The next round would bring the epsilon of everything this site has ever released above the largest one its policy "
        "allows. The site has refused the round **before** anything was computed or sent, and it will refuse every later one.",
        "This is the guard working. The budget is a decision of the hospital, not of the operator: whoever answers for it may "
        "raise the policy's largest epsilon, knowing that what was spent stays spent. `pathfed-site ledger show` shows what was spent,"
        " on which plans.",
        "site",
    ),
    Code.PLAN_LIMIT_REACHED: CatalogEntry(
        "The plan's own limit is reached",
        "The next round would bring this plan's epsilon above `privacy.epsilon_limit`. The site has refused it; other plans are "
        "not touched.",
        "The plan asks for more rounds than its limit pays for at this site's sampling rate. The operator can publish a plan with"
        " more noise, fewer expected patients or fewer rounds, which sites must approve again.",
        "operator",
    ),
    Code.COHORT_TOO_SMALL: CatalogEntry(
        "The cohort is smaller than declared",
        "The site has fewer usable patients than the number it declared publicly. The sampling rate, and with it the accounting, "
        "follows from the declared number, which must be a true lower bound.",
        "Approve the plan again with a declared number at or below the patients that `pathfed-site status` counts. Leave a margin"
        " for withdrawals.",
        "site",
    ),
    Code.LEDGER_DAMAGED: CatalogEntry(
        "The privacy ledger does not verify",
        "An entry of the ledger is half-written, missing, changed, out of order or wrongly signed, or the database that holds it is "
        "damaged. The site refuses to release anything, because what was spent is no longer certain.",
        "Do not edit the database. Find out what happened to the disk. Restoring an older copy would forget what was spent since;"
        " that is not a remedy. Keep the damaged database as evidence and ask the operator which statements of this site the "
        "record holds.",
        "site",
    ),
    Code.ACCOUNTANTS_DISAGREE: CatalogEntry(
        "The privacy accountants disagree",
        "The epsilon computed by dp_accounting (PLD) lies outside the bounds that independent methods give: above opacus' Renyi "
        "bound, below what a simple attack demonstrates, or outside the bounds of opacus' PRV accountant, by more than the stated "
        "tolerances. One of them must be wrong, so nothing was charged or released.",
        "Install the pinned versions of dp-accounting and opacus. If it stays, report the figures of the message with the plan's "
        "privacy section and both versions. Do not raise a tolerance.",
        "both",
    ),
    Code.BASE_STATE_UNTRAINABLE: CatalogEntry(
        "The base state does not train",
        "Tried on synthetic tiles, before any budget was spent, the encoder sent by the server gave a loss or a gradient that is "
        "not finite. The site has refused it.",
        "The operator should look at the last server steps: a learning rate that is too high is the common cause. Nothing was charged.",
        "operator",
    ),
    Code.POLICY_FORBIDS: CatalogEntry(
        "The hospital's policy forbids it",
        "The hospital's own policy rules out this plan or this encoder. The site obeys its policy first.",
        "Compare the plan with the site's policy file. Whoever answers for the policy decides whether to change it.",
        "site",
    ),
    Code.CLOCK_SET_BACK: CatalogEntry(
        "The clock was set back",
        "A charge would carry a time that lies more than five minutes before the time of an earlier charge, or the ledger holds charges "
        "whose times go backwards like that. The ledger's order is that of its numbers, so no epsilon is wrong; but a clock that goes "
        "backwards is what a machine put back to an earlier state looks like. Nothing was charged or released.",
        "Put the clock right (NTP) and let the client try again. If the clock is right now and was ahead when the last charge was made, "
        "charges are refused until that time has come. If neither is so, ask who restored this machine, and compare the ledger with the "
        "statements that the operator's records hold: `pathfed-site ledger verify --heads RECORD`.",
        "site",
    ),
    Code.LEDGER_BEHIND: CatalogEntry(
        "The ledger is older than what was seen of it",
        "Somebody has seen an entry that the ledger does not hold: the file beside the run secrets that remembers the ledger's head, a "
        "statement that this site has sealed, or the heads given with `--heads`. The database was restored from a backup, emptied, cut "
        "short or replaced, so that charges are forgotten. The site refuses to release anything.",
        "Put the newest database back if it is still there. If it is lost, do not train with this home: what it forgot was spent all the "
        "same. Make a new home with new keys, and lower its policy's largest epsilon by what the last statement of the old site in the "
        "operator's records says was spent (`epsilon_total`): epsilons of two ledgers add up, and so do their deltas. Do not delete or "
        "edit the file that remembers the head.",
        "site",
    ),
    Code.LEDGER_UNWITNESSED: CatalogEntry(
        "Nothing shows that the ledger is the newest",
        "The file beside the run secrets that remembers the ledger's head is missing or was changed. It is made with the home and left out "
        "of backups, so a home restored from a backup has none. The site refuses to release anything.",
        "Put `secrets/` back as it was, if it was moved. If it is lost, the runs' secrets are lost with it: make a new home, as for PF309.",
        "site",
    ),
    Code.TARGET_OUT_OF_REACH: CatalogEntry(
        "No plan within bounds meets the target",
        "Asked what a plan would need for a target epsilon, `pathfed plan privacy` found no value that a plan may have: the largest "
        "noise multiplier is still too little, or one expected patient a step, or a single round, is still too much.",
        "Raise the target, or change what is held fixed: fewer rounds, more noise, fewer expected patients, more declared patients.",
        "operator",
    ),
    Code.ENGINE_UNFIT: CatalogEntry(
        "The plan's engine does not fit its objective",
        "The plan asks for the book-keeping engine, but a layer of the model has no rule for the gradient of each patient, or the "
        "gradients on synthetic tiles are not those of the serial engine. The site has refused before any budget was spent.",
        'The operator sets `engine = "serial"` in the plan\'s `[compute]`; it takes any layer.',
        "operator",
    ),
}

_TRANSPORT: dict[Code, CatalogEntry] = {
    Code.CERTIFICATE_REFUSED: CatalogEntry(
        "A certificate is refused",
        "The certificate of the other side is expired, not yet valid, for another name, or not signed by the authority this side "
        "trusts. No data was exchanged.",
        "Check the clock of both machines first. Then compare the authority's certificate with the one in the server's card, and "
        "renew what has expired. A TLS-inspecting proxy on the way also looks like this: exempt the server's address.",
        "both",
    ),
    Code.NODE_KEY_UNKNOWN: CatalogEntry(
        "The site's Flower key is not registered",
        "The server does not know the key with which this site's SuperNode signs in, so it is turned away.",
        "The operator adds the site with `pathfed-server sites`, from the card which `pathfed-site init` wrote. After a new "
        "`init`, the card must be handed over again.",
        "operator",
    ),
    Code.SERVER_UNREACHABLE: CatalogEntry(
        "The server cannot be reached",
        "No connection to the server's fleet address. The site keeps trying; a round whose deadline passes meanwhile goes on without it.",
        "Check name, port and firewall: sites need outbound HTTPS to that one address. Where a proxy is needed set HTTPS_PROXY, "
        "never HTTP_PROXY, and keep 127.0.0.1 and localhost in NO_PROXY.",
        "both",
    ),
    Code.BUNDLE_REFUSED: CatalogEntry(
        "An app bundle is refused",
        "The server's Flower run names another app bundle than the one this version of pathfed ships. A site runs only the code "
        "installed on it, so the bundle was neither unpacked nor run.",
        "Bring server and site to the same version of pathfed. If they are, treat it as an attempt to run foreign code and tell "
        "the operator.",
        "both",
    ),
    Code.MESSAGE_MALFORMED: CatalogEntry(
        "A message is malformed",
        "A message does not have the form of this protocol version: keys missing or unknown, numbers out of range, or not "
        "readable at all. It was dropped.",
        "Compare the versions of pathfed at both ends.",
        "both",
    ),
    Code.OFFER_NOT_AUTHENTIC: CatalogEntry(
        "A round offer is not authentic",
        "The offer's signature is not that of the server this site knows, or the offer is for another site. The site has not "
        "answered it with data.",
        "If the server was set up anew, its new card must reach every site. Otherwise find out who sent the offer.",
        "both",
    ),
    Code.PLAN_NOT_APPROVED: CatalogEntry(
        "The plan is not approved at this site",
        "A round was offered for a plan that this hospital has not approved, has rejected, or whose approval it has "
        "revoked. A site trains for "
        "approved plans only.",
        "Read the plan (`pathfed-site show`) and approve it, or let it be: the round goes on without this site. A plan of the same name is "
        "another plan where its digest is another.",
        "site",
    ),
    Code.BASE_STATE_MISMATCH: CatalogEntry(
        "The base state is not the one offered",
        "The encoder that arrived does not have the digest, the size or the tensors that the signed offer names. It was discarded"
        " before any budget was spent.",
        "A damaged transfer heals with the next offer. If it repeats, something between server and site changes data.",
        "both",
    ),
    Code.ROUND_OUT_OF_ORDER: CatalogEntry(
        "A round is out of order",
        "The offer names an earlier round than one this site has already answered, or a round the plan does not have, or its times "
        "do not fit: its deadline has passed or is not the plan's, or it lies in the future by the site's clock. It was refused and "
        "nothing was charged, so that no round is answered twice with different noise and nothing is spent on an answer that cannot "
        "count.",
        "Compare the clocks of site and server (a few minutes are tolerated). After the server was restored from a backup it may offer "
        "old rounds: continue from the last round that the record holds.",
        "operator",
    ),
    Code.SITE_INTERNAL: CatalogEntry(
        "The site failed inside",
        "Something went wrong at the site which has no code of its own. By design the server learns no more than this; the "
        "details are in the site's log.",
        "The site's IT looks at the log of its runner for this time. The round went on without the site if the quorum held.",
        "site",
    ),
    Code.SITE_STOPPED: CatalogEntry(
        "The site was stopped by its own people",
        "Somebody at the hospital has thrown the stop switch (`pathfed-site stop`). A round that was being computed was broken off, "
        "nothing of it left the site, and what was charged for it stays charged.",
        "`pathfed-site status` says since when and why. `pathfed-site resume` lets the site answer again.",
        "site",
    ),
    Code.OUTSIDE_HOURS: CatalogEntry(
        "No round begins at this hour",
        "The hospital's policy has hours within which rounds may begin, and the offer came outside them. Nothing was charged; the round "
        "goes on without this site.",
        "Nothing at the site. An operator who wants this site in a run plans the run's rounds for its hours. The hours are `hours`, "
        "`weekends` and `time_zone` in `policy.toml`.",
        "both",
    ),
    Code.SECOND_PERSON_MISSING: CatalogEntry(
        "A second person must sign the approval",
        "The hospital's policy (`second_person`) wants two approvers under an approval, each with a key of their own, and "
        "fewer have signed these very figures, or one of them is no approver any more. The site answers no offer for the plan.",
        "Let another approver run `pathfed-site approve` for the plan, with the same number of patients, `--approver` and `--key`. "
        "`pathfed-site show` says who has signed.",
        "site",
    ),
    Code.APPROVER_UNKNOWN: CatalogEntry(
        "The approver is not known, or known already",
        "The name that was given is no approver of this site, has another key, or is to be added while an approver of "
        "this name or with this key is there.",
        "`pathfed-site approvers list` shows names and keys. Two people have two names and two keys; to exchange a "
        "key, remove the person and add them again.",
        "site",
    ),
    Code.PLAN_NOT_HERE: CatalogEntry(
        "No plan, or several, go by this name",
        "A command named a plan that did not come to this site, or named several: two plans may have one name, and "
        "digests may begin alike. Nothing was done.",
        "`pathfed-site plans` lists what is here. Name the plan by as much of its digest as makes it one, or by the file that the operator "
        "handed over.",
        "site",
    ),
    Code.PLAN_DECIDED: CatalogEntry(
        "The site has decided on this plan already",
        "A plan that was approved cannot be rejected, only one that is approved can be revoked, and an approval that "
        "was revoked is not given again. Nor is a plan approved twice with other figures, another way of replying or another public name: "
        "what a site has said about a plan is evidence, and stays.",
        "Take an approval back with `pathfed-site revoke`. To take part after a revocation, ask the operator to publish the plan under "
        "another name.",
        "site",
    ),
    Code.CODE_CHANGED: CatalogEntry(
        "The installed code is not that of its wheel",
        "At its start the client compares every file of its own with the list that came with the wheel (RECORD), and files differ, are "
        "missing or are there besides. It does not start: what it would state about its code would not be what was installed and reviewed.",
        "Install the wheel again into a fresh environment, and find out who changed the files that the message names.",
        "site",
    ),
    Code.FOREIGN_CODE: CatalogEntry(
        "Other code stands before the installed code",
        "Python finds one of pathfed's packages elsewhere than the installation put it: a variable (PYTHONPATH), a `.pth` file or a folder "
        "shadows it. The client does not start.",
        "Unset PYTHONPATH for the client's service, and look at the place that the message names.",
        "site",
    ),
    Code.INVITATION_UNREADABLE: CatalogEntry(
        "The invitation cannot be read",
        "The text is not an invitation, or not a whole one: a letter is missing or was changed on the way.",
        "Give the text exactly as `pathfed-server invite` printed it; spaces and line breaks do not matter. If it is lost, ask the "
        "operator for another.",
        "site",
    ),
    Code.INVITATION_REFUSED: CatalogEntry(
        "The invitation is not valid",
        "The server does not know the invitation, or it was used by another request, is too old, or was replaced by a newer one. Which of "
        "these it is, the server does not say to a stranger.",
        "Ask the operator for a new invitation (`pathfed-server invite`). If you never used it, say so: somebody else may have.",
        "site",
    ),
    Code.ENROLMENT_UNFIT: CatalogEntry(
        "The enrolment does not fit its invitation",
        "The site card does not verify, names another site than the one that was invited, or holds a node key that is not one.",
        "Enrol with the home whose site has the invitation's name, and the invitation of that site.",
        "both",
    ),
    Code.CERTIFICATE_REQUEST: CatalogEntry(
        "The certificate request cannot be used",
        "It is not a PKCS #10 request in DER with a valid signature of its own key, the key is not on P-256 or P-384, or the key has a "
        "certificate already.",
        "Let `pathfed-site` make the request. Each certificate is for a new key.",
        "both",
    ),
    Code.IDENTITY_REFUSED: CatalogEntry(
        "The client certificate is not accepted",
        "The certificate was revoked, replaced, has expired, was not issued here, or its site is not enrolled any more.",
        "Ask the operator. A site that was offline until its certificate expired is invited again, and keeps its keys and its ledger.",
        "site",
    ),
    Code.REQUEST_REFUSED: CatalogEntry(
        "The server cannot read the request",
        "The message is malformed, too large, holds a value out of bounds, or came without a deadline.",
        "Use the same version of pathfed as the server. If it goes on, tell the operator.",
        "both",
    ),
    Code.RATE_LIMITED: CatalogEntry(
        "Too many requests in a short time",
        "The server takes so many requests a second from one site or address, and so many bytes at the fleet door, and no more.",
        "Wait a minute. If pathfed does this by itself, tell us: it should not.",
        "both",
    ),
    Code.ROTATION_REFUSED: CatalogEntry(
        "The new key is not accepted",
        "The change of key is not signed by the present key, names another site or key, or the new key was in use before; or the site "
        "takes part in a run that is planned or still going, in which its keys stay.",
        "Wait for the run to end, or ask the operator to stop it; then rotate again. A key that was ever used is not used again.",
        "both",
    ),
    Code.CONTROL_INTERNAL: CatalogEntry(
        "The control service failed inside",
        "Something in the server failed that should not. Nothing was done, or nothing more than what was answered before.",
        "Try again later. The operator finds the cause in `logs/control.log` of the server's home.",
        "both",
    ),
    Code.AUTHORITY_STATE: CatalogEntry(
        "The authority is not in the state for this",
        "A rotation of the certificate authority is going on, none is, or some sites do not trust the new authority yet.",
        "`pathfed-server ca show` says where it stands, and which sites are missing.",
        "operator",
    ),
    Code.FINGERPRINT_DIFFERS: CatalogEntry(
        "The fingerprint is another one",
        "What the hospital read out is not the fingerprint of the request that reached the server. Somebody may have exchanged keys on the "
        "way, or used the invitation before the hospital did. The site is not admitted.",
        "Compare once more, letter by letter. If it stays different, refuse the request, invite the site again, and find out who had the "
        "invitation.",
        "operator",
    ),
    Code.NOT_ENROLLED: CatalogEntry(
        "The site is not enrolled",
        "The home has no server card and no certificate yet: no server knows it, so there is nothing to connect to or to approve.",
        "Ask the operator for an invitation, then `pathfed-site enroll INVITATION`. If you asked already, the operator has not decided yet:"
        " tell them the fingerprint that `pathfed-site keys show` prints, and run the same `enroll` again.",
        "site",
    ),
    Code.PIN_DIFFERS: CatalogEntry(
        "The server is not the one in the invitation",
        "The certificate authority or the evidence key of the server that answers is not the one that the invitation pins. Another server "
        "answers at that address, or somebody between intercepts TLS. Nothing was sent but a greeting, and nothing was stored.",
        "Do not go on. A proxy that opens TLS must let this address through unopened. Compare address and keys with the operator by "
        "telephone, and ask for a new invitation if the CA was changed since.",
        "both",
    ),
    Code.ENROLMENT_REFUSED: CatalogEntry(
        "The operator has refused the enrolment",
        "The operator looked at the request and did not admit the site, because the fingerprint differed or for another reason.",
        "Ask the operator. A new invitation starts again; the home and its keys can stay.",
        "site",
    ),
    Code.ANSWER_UNUSABLE: CatalogEntry(
        "The server's answer cannot be used",
        "The server answered something that a server of this version does not answer: an unknown state or code, a certificate for another "
        "key or another site, a card that does not verify. Nothing of it was stored.",
        "Compare the versions of pathfed at both ends. If they are the same, tell the operator.",
        "both",
    ),
    Code.LOG_FORKED: CatalogEntry(
        "The server's log contradicts what this site has cosigned",
        "The log is smaller than, or different from, or not shown to continue, the log that this site has cosigned. Two audiences may be "
        "shown two histories, or the server's database was restored from a backup. The site has not cosigned it; the server's own signed "
        "checkpoint is kept as evidence.",
        "Do not go on as if nothing were. Call the other sites and compare the latest checkpoints; ask the operator whether the server was "
        "restored. `pathfed-site status` shows the alarm for as long as the home exists.",
        "both",
    ),
    Code.LOG_LEAF_MISSING: CatalogEntry(
        "What the server acknowledged is not in its log",
        "The server took this site's word, and two minutes later its log does not hold it. The site does not cosign a log without it.",
        "Ask the operator. The alarm ends when the leaf is in; that it was missing stays on record.",
        "both",
    ),
    Code.LOG_HEAD_LOST: CatalogEntry(
        "What this site has cosigned last is lost",
        "The file `secrets/log-head` is missing or was changed: this home was restored from a backup, or somebody changed it. A site that "
        "does not know what it has cosigned could be led to cosign a second history, so it cosigns nothing.",
        "Put the newest `secrets/` back. If it is gone, the site has to be revoked and enrolled again with a new home.",
        "site",
    ),
    Code.LOG_UNREADABLE: CatalogEntry(
        "The server's log cannot be read",
        "The server shows a checkpoint that its log key did not sign, or leaves of a kind that this version does not know. The site has "
        "not cosigned it.",
        "Compare the versions of pathfed at both ends. If they are the same, tell the operator and the other sites.",
        "both",
    ),
    Code.LOG_FOREIGN_LEAF: CatalogEntry(
        "The log names something of this site that it never made",
        "The log names a statement, word or key of this site that this home does not know. Either this home was put back to an earlier "
        "state and has forgotten it, or somebody else holds this site's key, or the server made it up.",
        "Was this disk or database restored? Then charges were forgotten: do not train with it (PF309), revoke the site and enrol a new "
        "home. If not, ask the operator for the envelope behind the leaf: its signature shows whose key made it.",
        "both",
    ),
    Code.ROTATION_WAITS: CatalogEntry(
        "The evidence key cannot be rotated yet",
        "Words of this site on plans are signed with the present key and have not reached the server, which would not take them any more "
        "once another key is the site's. Nothing was changed.",
        "Let `pathfed-site start` run until `pathfed-site status` shows no waiting words. Then stop it and rotate.",
        "site",
    ),
    Code.RELAY_STRANGER: CatalogEntry(
        "A stranger spoke to the site's relay",
        "A process that does not belong to the user whom the site runs as connected to the relay's port on this machine, or there were too "
        "many connections. It was closed before anything it said was read, and nothing left.",
        "Find out which user of this machine did it (the number in `logs/relay.log` is theirs) and why. On a system that does not tell "
        "whose a connection is, which is any but Linux, the relay refuses everybody.",
        "site",
    ),
    Code.PROXY_REFUSED: CatalogEntry(
        "The web proxy does not let the site out",
        "The proxy that `https_proxy` names does not open a way to the server: it refuses the host or the port, asks for a password, or "
        "its address cannot be used.",
        "Let the proxy pass CONNECT to the server's addresses, without inspecting TLS. Give `http://HOST:PORT`, or "
        "`http://USER:PASSWORD@HOST:PORT` where it answers 407.",
        "site",
    ),
    Code.FILE_NOT_OFFERED: CatalogEntry(
        "The server has no such file for this site",
        "The site asked for a base state that the server does not have, or that belongs to no run in which the site takes part: a run "
        "that lists it and whose plan it has approved. The server says the same in both cases. Nothing was charged.",
        "If the site was offered the round, tell the operator: the state's file may be missing in the server's home (`pathfed-server "
        "run status`). A site that has just revoked its approval gets this once and nothing more.",
        "both",
    ),
    Code.UPDATE_UNWANTED: CatalogEntry(
        "No update of this round is wanted from the site",
        "The site began to send an update for a round in which it is not asked, or whose outcome for it is decided already, or of which"
        " another update of the site lies at the server. One update is taken from a site in a round. What the site has sealed stays at "
        "the site.",
        "Where the round's deadline passed while the site was sending, nothing is to be done: the site takes part in the next round. If"
        " it happens in every round, the line is too slow for the plan: give the next plan a longer `rounds.deadline_s`. A site whose "
        "disk was restored from a backup may have made another update for the same round: only the first one counts.",
        "both",
    ),
    Code.UPDATE_TOO_LARGE: CatalogEntry(
        "The update is larger than the plan's",
        "The site announced more bytes than the plan's tensors need, or a list of shards that no file has. Nothing of it was taken.",
        "Compare the versions of pathfed at both ends. A site that does this on purpose can fill no disk.",
        "operator",
    ),
    Code.SHARD_DAMAGED: CatalogEntry(
        "A part of a file arrived damaged",
        "Bytes of a base state or an update do not have the digest that names them. The part was thrown away and is sent again by "
        "itself; a few times in a row end the transfer with this code. Nothing damaged is ever used.",
        "Once in a long while it is the line or a disk. If it repeats, something between server and site changes data, or the file on "
        "the sender's disk has changed: check the disks at both ends.",
        "both",
    ),
    Code.UPDATE_ABSENT: CatalogEntry(
        "A statement came without its update",
        "A site sends its update first and its statement when all of the update lies at the server. This site's statement came, and its"
        " update is not there, or not whole. The site is refused for this attempt at the round; if the round is offered again, it sends"
        " the same update again.",
        "If somebody has cleaned the server's home by hand (`runs/<run>/spool`), that is why. Otherwise look at the site's log with its"
        " IT: software of another version, or a site that does not keep to the order.",
        "operator",
    ),
    Code.TRANSFER_UNFINISHED: CatalogEntry(
        "A transfer was not finished by the deadline",
        "A base state or an update could not be moved before the round's deadline. The site tried again after every cut and kept what "
        "had arrived: the next offer of the same round goes on from there. Nothing is charged for a base state that did not arrive; an "
        "update that was sealed stays at the site and is sent when the round is offered again.",
        "Compare the size (`pathfed-server run status`) with the line: 2 GB need 3 minutes at 100 Mbit/s and 27 at 10. Raise "
        "`bandwidth_mbit_s` in the site's `policy.toml` if it is what limits, or ask the operator for a longer `rounds.deadline_s`.",
        "both",
    ),
    Code.UPLOAD_MOVED: CatalogEntry(
        "An upload goes on elsewhere",
        "Bytes were sent for another place than the one where the server's copy ends: a newer connection of the same site has taken the"
        " upload over, or the server was started again. The site asks where to go on and does so by itself.",
        "Nothing is to be done. If a site's log shows it without end, two clients run with one home's keys: stop one.",
        "both",
    ),
}

_ROUNDS: dict[Code, CatalogEntry] = {
    Code.SITE_UNKNOWN: CatalogEntry(
        "The site is not known",
        "No site of that name is in the server's database.",
        "`pathfed-server sites` lists the names. Add the site from its card first.",
        "operator",
    ),
    Code.SITE_EXISTS: CatalogEntry(
        "The site is known already",
        "A site of that name, or with one of these keys, is in the database already. Keys are not replaced silently.",
        "Choose another name, or check which hospital holds it.",
        "operator",
    ),
    Code.QUORUM_LOST: CatalogEntry(
        "Too few updates for the round to count",
        "By the round's deadline fewer updates were admitted than `rounds.quorum`. The encoder is unchanged, and the run has "
        "stopped. What the sites were charged for this round stays charged.",
        "`pathfed-server rounds` shows each site's code. Bring enough sites back, then continue the run.",
        "operator",
    ),
    Code.UPDATE_SIGNATURE: CatalogEntry(
        "An update's statement is not signed by its site",
        "The statement that came with an update is unsigned, signed by another key, or names another site, run or plan. The "
        "update is quarantined and does not count.",
        "If the site made new keys, it must hand over its new card. Otherwise treat it as an attempt to speak for that hospital.",
        "operator",
    ),
    Code.UPDATE_DIGEST: CatalogEntry(
        "An update is not the one signed",
        "The bytes of the update do not have the digest or the length that its signed statement names. It is quarantined and does"
        " not count.",
        "A single case points to a damaged transfer. If it repeats for one site, look at what lies between.",
        "operator",
    ),
    Code.UPDATE_SHAPE: CatalogEntry(
        "An update has the wrong tensors",
        "Names, shapes or number type of the update differ from what the plan trains and sends. It is quarantined and does not count.",
        "Compare the site's version of pathfed with the server's.",
        "operator",
    ),
    Code.UPDATE_NOT_FINITE: CatalogEntry(
        "An update holds NaN or infinity",
        "At least one number of the update is not finite; one such update would ruin the encoder for everyone. It is quarantined "
        "and does not count.",
        "Noise and clipping cannot give this on sound hardware. The site's IT should check memory and GPU.",
        "both",
    ),
    Code.UPDATE_NORM: CatalogEntry(
        "An update is larger or smaller than clipping and noise allow",
        "The update's norm is above the bound that follows from the plan's clip norm, noise and number of parameters, or below "
        "the norm of the noise that its statement promises. It is quarantined and does not count.",
        "An honest site exceeds the bound practically never. Compare versions and plan digests; then talk to the site.",
        "operator",
    ),
    Code.UPDATE_QUANTISED: CatalogEntry(
        "The int8 numbers of an update are not such as rounding gives",
        'With `wire.dtype = "int8"` a block of 256 numbers has one scale, and its largest number is 126 or 127 scales: the scale is '
        "taken from it. This update has a block with a negative scale, a scale that its numbers do not reach, or a number of -128. "
        "It is quarantined and does not count; the round goes on with the other sites.",
        "No version of pathfed writes such a file. Compare the site's version with yours; then talk to the site.",
        "operator",
    ),
    Code.UPDATE_STALE: CatalogEntry(
        "An update is for another round or base state",
        "The statement names another round, base state or predecessor than the server expects, or the site sent a second, different "
        "update for the round. It is quarantined and does not count.",
        "The site restarted in between, and the next round will be in order. A site that does it round after round is suspended (PF565).",
        "operator",
    ),
    Code.RUN_UNKNOWN: CatalogEntry(
        "The run is not known",
        "No run of that name is in the server's database.",
        "`pathfed-server rounds` without a name lists the runs.",
        "operator",
    ),
    Code.RUN_STATE: CatalogEntry(
        "The run is in another state",
        "What was asked is not possible in the run's present state: a finished run cannot be continued, a running one not started again.",
        "`pathfed-server rounds` shows the state.",
        "operator",
    ),
    Code.DATABASE_UNAVAILABLE: CatalogEntry(
        "The database cannot be used",
        "The database cannot be opened, does not answer, or stayed locked for too long. What was not committed has not happened; "
        "the run continues from the last committed round.",
        "Check the URL, the password file, the service, and free disk space. SQLite files must lie on a local disk, not on a "
        "network share. A run needs nothing: its round loop and `pathfed-server start` say so once, wait, and go on when the database is "
        "back.",
        "operator",
    ),
    Code.DATABASE_SCHEMA: CatalogEntry(
        "The database has another schema",
        "The database was written by a newer pathfed, or is not one of ours. It was not touched.",
        "Use the version that wrote it, or name another database. Older schemas are upgraded when the server starts.",
        "operator",
    ),
    Code.RUN_FAILED: CatalogEntry(
        "The run has failed",
        "The Flower run that drives the rounds ended without finishing them. Everything up to the last committed round is safe.",
        "The message names the log. Start the run again once the cause is gone: it continues after the last committed round.",
        "operator",
    ),
    Code.SITE_SILENT: CatalogEntry(
        "A site did not answer",
        "No reply came from the site before the round's deadline, though the offer was sent again whenever its SuperNode came back or "
        "Flower said that it was lost. The round went on with the others if the quorum held.",
        "Ask the site's IT whether its client runs (`pathfed-site status`) and reaches the server. A site that is merely slow "
        "needs a longer `rounds.deadline_s` in a new plan.",
        "both",
    ),
    Code.PLAN_UNKNOWN: CatalogEntry(
        "The plan is not known",
        "No plan of that name or digest is in the database.",
        "`pathfed-server plan` lists the published plans with their digests.",
        "operator",
    ),
    Code.UPDATE_PRIVACY: CatalogEntry(
        "The update's stated mechanism is not the plan's",
        "The site signed a statement whose sampling rate, noise, clip norm, number of steps or delta differ from those the plan "
        "gives for the patients it declared, or that leaves one of them out; or it states a loss or a number of patients that patients and "
        "that noise do not give. The update is in quarantine and did not count.",
        "Compare the site's declared patients in its approval with the plan. A site with changed software states another "
        "mechanism: check its version, and revoke it if nobody can explain the difference.",
        "operator",
    ),
    Code.SITE_REVOKED: CatalogEntry(
        "The site is revoked",
        "The site was enrolled once and has been revoked since. It is asked for no round, and what it sends counts for nothing.",
        "If it is to take part again, enrol it under a new name with new keys.",
        "operator",
    ),
    Code.APPROVAL_DIFFERS: CatalogEntry(
        "The site has approved this plan with other figures",
        "A second approval of the same plan declares another number of patients, another way of replying or another public name than "
        "the first. Noise and budget rest on those figures, and the log holds the first approval: it stands.",
        "Publish a plan with another name and let the site approve that one with the new figures.",
        "both",
    ),
    Code.RUN_EXISTS: CatalogEntry(
        "A run of that name exists",
        "Run names are never reused: the record and the sites' budgets refer to them.",
        "Choose another name; `pathfed-server rounds` shows the runs there are.",
        "operator",
    ),
    Code.ENROLMENT_UNKNOWN: CatalogEntry(
        "No enrolment is waiting for this site",
        "There is no request of this site to decide: none came yet, or it was decided before.",
        "`pathfed-server sites pending` lists what is waiting.",
        "operator",
    ),
    Code.OPERATOR_UNKNOWN: CatalogEntry(
        "Who runs the command is not known",
        "This server has operators by name, so each command says who runs it, by that person's key. No key was given, or it is not the key "
        "of an operator.",
        "Let `PATHFED_OPERATOR_KEY` name the file with your key. An admin adds people with `pathfed-server operators add`.",
        "operator",
    ),
    Code.OPERATOR_FORBIDDEN: CatalogEntry(
        "The operator's role does not allow this",
        "Auditors look, operators also invite and admit sites, publish plans and carry out runs, admins also decide about operators and "
        "the certificate authority. Or it would leave the server without an admin.",
        "Ask somebody with the role; `pathfed-server operators list` names them.",
        "operator",
    ),
    Code.OPERATOR_EXISTS: CatalogEntry(
        "An operator has this name or key",
        "Names and keys of operators are never used again, because the audit trail refers to them.",
        "Choose another name, or make a new key with `pathfed-server operators key`.",
        "operator",
    ),
    Code.APPROVAL_REVOKED: CatalogEntry(
        "The site has revoked its approval",
        "A site took its approval of a plan back. A revocation is for good: the site gets no message for this plan any more, however its "
        "rounds stand, and an approval of it that is handed in later, an old one too, is refused. What was committed before stays.",
        "Respect it. To ask the site again, publish the plan under another name.",
        "operator",
    ),
    Code.WORD_OUT_OF_ORDER: CatalogEntry(
        "A site's word does not follow its last one",
        "A rejection came for a plan that the site has approved, or a revocation that names another approval than the one on record. "
        "Nothing was recorded.",
        "The site takes an approval back with `pathfed-site revoke`. Hand words in, in the order in which the site gave them.",
        "both",
    ),
    Code.APPROVAL_OUTDATED: CatalogEntry(
        "A site has another key than the one it approved with",
        "The site replaced its evidence key after it approved the plan. A run's record holds one key for each site, and would not verify. "
        "No run was started or resumed.",
        "Publish the plan again under another name and ask the sites to approve that; or name sites without this one.",
        "operator",
    ),
    Code.ROUND_STATE: CatalogEntry(
        "The round is in another state",
        "A round was to make a step that its state does not allow, such as a commit before its updates were admitted. Nothing was changed. "
        "The round loop ends here, and the next attempt begins the round again, with the same index and base state.",
        "Nothing, where it happens once: another loop had the run. Where it comes again, `pathfed-server audit --subject RUN` shows every "
        "transition of the run's rounds; send it with `logs/server-app.log` to whoever maintains this software.",
        "operator",
    ),
    Code.UPDATE_LATE: CatalogEntry(
        "An update came after the round's deadline",
        "The update came for the right round and base state, but late. It does not count in this attempt at the round; the "
        "site's budget is spent all the same. Under the plan's `rounds.late = 'same_base'` it is kept, and counts where the "
        "round fails and is offered again; under `discard` it is in quarantine.",
        "Give the next plan a longer `rounds.deadline_s`, or find out why the site is slow. While the round is not committed, "
        "`pathfed-server quarantine release` lets a quarantined update count that is only late.",
        "operator",
    ),
    Code.SITE_NOT_ASKED: CatalogEntry(
        "It was not the site's turn in this round",
        "The plan asks at most `rounds.ask_at_most` sites a round. They take turns by a public rule that anyone can compute "
        "from plan, run and round, and `pathfed verify` checks it. The site spent nothing in this round.",
        "Nothing: this is as planned.",
        "both",
    ),
    Code.UPDATE_NOT_NEEDED: CatalogEntry(
        "The round had enough updates before this site answered",
        "The plan closes a round once `rounds.enough` updates are admitted. This site was asked too and had not answered by "
        "then. Where it had begun to train, its budget for the round is spent: the charge comes before the training.",
        "Nothing, where it happens now and then. Where it is always the same site, it is slower than the others: ask fewer "
        "sites (`rounds.ask_at_most`) or wait for all (`rounds.enough = 0`) in the next plan.",
        "both",
    ),
    Code.SITE_LEFT_RUN: CatalogEntry(
        "The site was taken out of the run",
        "The operator took the site out of this run with `run sites --remove`. From the next round on it is not asked. What it "
        "gave before stays in the encoder and in the record.",
        "`pathfed-server run sites RUN --add SITE` takes it in again, at the next round.",
        "operator",
    ),
    Code.SITE_SUSPENDED: CatalogEntry(
        "The site is suspended",
        "The site's updates were refused in several rounds running, for reasons of its own (`suspend_after` in server.toml, 3 "
        "if not set). So that it does not cost every round its share, and its own budget, it is asked no more. The site sees "
        "this with `pathfed-site status`.",
        "Find out with the site what is wrong: `pathfed-server quarantine list RUN` has the codes. Then `pathfed-server sites "
        "reinstate SITE`.",
        "both",
    ),
    Code.RELEASE_REFUSED: CatalogEntry(
        "The quarantined update cannot be released",
        "Only an update that was refused for its norm (PF508) or for coming late (PF561) may be released, and only while its "
        "round is not committed. Signature, digest, shapes, finiteness and privacy are never waived. Or the file in quarantine "
        "is gone or changed.",
        "Leave it in quarantine. Where the run has stopped for want of updates, mend the site, then `pathfed-server run resume`.",
        "operator",
    ),
    Code.QUARANTINE_UNKNOWN: CatalogEntry(
        "No such entry is in quarantine",
        "The number names no update that was set aside.",
        "`pathfed-server quarantine list` shows the entries with their numbers.",
        "operator",
    ),
    Code.NOTICE_REFUSED: CatalogEntry(
        "A receiver did not take a notification",
        "The web server answered with another status than 2xx (a redirect is not followed), or the mail server refused the login, the "
        "mail or its recipients. The message is sent again, less and less often, until it arrives or is given up. No round waits for "
        "it.",
        "The number in the message is the receiver's answer: 401 or 403, and 535 of a mail server, mean the secret or password; 404 "
        "the URL; 429 and 5xx that the receiver is overloaded or broken. Correct `notify.toml`, then try `pathfed-server notify test "
        "NAME`.",
        "operator",
    ),
    Code.NOTICE_TIMEOUT: CatalogEntry(
        "A receiver did not answer in time",
        "The receiver of a notification was connected to, or was to be, and had not taken the message after 20 seconds. It is sent "
        "again, so that it may arrive twice, under the same id. No round waits for it.",
        "Look whether the receiver works, and whether a firewall drops the connection without a word. Then try `pathfed-server notify "
        "test NAME`.",
        "operator",
    ),
    Code.NOTICE_TLS: CatalogEntry(
        "No trusted TLS with a receiver",
        "The receiver's certificate is not trusted, is for another name, or the receiver offers no TLS. Nothing was sent, no password "
        "either.",
        "Let `ca_file` in `notify.toml` name the authority, PEM, if it is one of your own. For a mail server check `security` and "
        '`port`: 587 goes with "starttls", 465 with "tls". Verification cannot be switched off.',
        "operator",
    ),
    Code.NOTICE_UNREACHABLE: CatalogEntry(
        "A receiver is not reached",
        "The name of a notification's receiver has no address, nobody listens there, or the connection broke. The message is sent "
        "again, less and less often, until it arrives or is given up. No round waits for it.",
        "Check host and port in `notify.toml`, name resolution, and the firewall for outgoing connections. Proxies are not used. Then "
        "try `pathfed-server notify test NAME`.",
        "operator",
    ),
    Code.RECEIVER_UNKNOWN: CatalogEntry(
        "No receiver of this name",
        "`notify.toml` in the server's home has no receiver with the name that was given.",
        "`pathfed-server notify status` lists the receivers. Each is a table `[webhook.NAME]` or `[mail.NAME]`.",
        "operator",
    ),
    Code.NOTICE_GIVEN_UP: CatalogEntry(
        "A notification was given up",
        "A message could not be delivered for as long as `give_up_hours` says. The audit trail has an event `notification.failed` with "
        "the numbers of the events that it told of; other receivers are told of that. What happens later is tried anew.",
        "`pathfed-server notify status` says why. Read what was missed with `pathfed-server events --since NUMBER`, mend the receiver, "
        "and try `pathfed-server notify test NAME`.",
        "operator",
    ),
}

_PROVENANCE: dict[Code, CatalogEntry] = {
    Code.RECORD_CHANGED: CatalogEntry(
        "A file of the record was changed",
        "A file no longer has the digest that the signed record gives for it. The record does not prove what this file says.",
        "Get the record again from its source. If the copy at the source fails too, do not use the encoder, and tell the sites "
        "whose statements it holds.",
        "both",
    ),
    Code.RECORD_SIGNATURE: CatalogEntry(
        "A signature of the record is wrong",
        "An envelope in the record is not signed by the key it claims, is signed by a key the record does not introduce, or is "
        "not in its one exact form.",
        "Get the record again. If it still fails, somebody has changed or forged a part of it.",
        "both",
    ),
    Code.STATEMENT_CHAIN: CatalogEntry(
        "A site's statements do not follow each other",
        "Each statement of a site names the one before it, and the rounds' base states name each other likewise. In this record a"
        " link is missing, doubled or reordered.",
        "Get the record again, whole. If it still fails, a round was left out, added or replaced.",
        "both",
    ),
    Code.IDENTITY_UNPROVEN: CatalogEntry(
        "The record is consistent, but names prove nothing",
        "Everything fits together, but no trusted key was given, so whoever made the record may have invented the hospitals too.",
        "Give the sites' public evidence keys, obtained from the hospitals themselves, with `--trust`.",
        "both",
    ),
    Code.RECORD_INCOMPLETE: CatalogEntry(
        "The record is incomplete",
        "A file which the record lists is not there, or a part that every record has is missing.",
        "Copy the whole folder again. A run that is still going has no complete record yet.",
        "both",
    ),
    Code.RUN_UNFINISHED: CatalogEntry(
        "The run is not finished",
        "Only a finished run has an encoder to release: every round of its plan committed, and the encoder exported into its record.",
        "Wait for the run to finish, or resume it. `pathfed-server run status` shows where it stands.",
        "operator",
    ),
    Code.QUORUM_MISSING: CatalogEntry(
        "Too few sites have co-signed the log",
        "A release counts once more than half of the enrolled sites have co-signed a checkpoint of the log that contains it, and more "
        "than half of those enrolled before each admission and revocation have co-signed that. With fewer, the operator alone could "
        "show two histories to two readers.",
        "At the server: wait until the sites that the message names are connected and have co-signed, then run the command again. "
        "At a reader: the bundle does not verify; ask the operator for one with a quorum.",
        "both",
    ),
    Code.BUNDLE_UNREADABLE: CatalogEntry(
        "Not a bundle or record that can be read",
        "There is no release and no run's record at this place, or it is an archive of another form. Nothing was verified, so nothing "
        "is said about it.",
        "Name the folder that holds `release.dsse` or `manifest.dsse`, or the tar archive of a bundle as it was handed over.",
        "both",
    ),
    Code.BUNDLE_FILES: CatalogEntry(
        "A file of the bundle is missing, extra or changed",
        "A bundle holds exactly the files that its signed lists name, byte for byte. A file beside them could be taken for a part of "
        "the release that nobody signed.",
        "Get the bundle again from the operator. Keep notes of your own outside its folder.",
        "both",
    ),
    Code.MODEL_SIGNATURE: CatalogEntry(
        "The model signature does not verify",
        "The OpenSSF signature is not by the key that the release names, or its files are not those of the encoder's folder.",
        "Do not use the encoder. Get the bundle again, and if it still fails, ask the operator.",
        "both",
    ),
    Code.MODEL_CARD: CatalogEntry(
        "The model card is not what the record gives",
        "A model card is made from plan, approvals, statements and round records. Made again, it differs from the one in the bundle: "
        "somebody changed a figure or a sentence.",
        "Do not believe the card. Ask the operator for a bundle as `pathfed-server release create` wrote it.",
        "both",
    ),
    Code.LOG_DISAGREES: CatalogEntry(
        "Log and record do not agree",
        "The transparency log lacks something that the record holds, has something of this run that the record lacks, names another "
        "digest, or has it in an order that cannot be: such as an update logged after the state that it went into.",
        "Do not use the encoder. Keep the bundle: it is evidence. Ask the operator, and the sites that co-signed.",
        "both",
    ),
    Code.EPSILON_EXCEEDED: CatalogEntry(
        "A site's epsilon is above the plan's limit",
        "The recorded releases of a site cost a patient more than the `privacy.epsilon_limit` of the plan which it approved, or it "
        "says so itself. A site's ledger refuses such a round; this record says that it took place.",
        "Tell the site. Its ledger shows what was charged: `pathfed-site ledger verify`.",
        "both",
    ),
    Code.REPLAY_DIFFERS: CatalogEntry(
        "The updates do not give the recorded states",
        "Averaged and applied as the plan says, the retained updates give a state with another digest than the record's: the "
        "recorded state is not the aggregate of the updates that the sites signed.",
        "Repeat it on a machine with the pinned torch release. If it still differs, do not use the encoder, and ask the operator.",
        "both",
    ),
    Code.UPDATE_MISSING: CatalogEntry(
        "An update for the replay is missing or another",
        "To recompute the states, every admitted update is needed as its site signed it: `round-0001/<site>.safetensors` and so on. "
        "One is missing, cannot be read, or has another digest than its statement.",
        "Give the folder `updates` of the server's record. Updates are there where `retain_updates` was on in server.toml.",
        "both",
    ),
    Code.AGGREGATION_UNPROVEN: CatalogEntry(
        "The aggregation was not recomputed",
        "Everything that was checked holds, but nothing shows that the states are the aggregate of the updates: for that they must be "
        "recomputed from the updates themselves.",
        "Ask the operator for the retained updates, and verify again with `--replay`.",
        "both",
    ),
    Code.EVALUATION_UNREADABLE: CatalogEntry(
        "Not an evaluation that a model card can show",
        "An evaluation is a JSON object with a text or a number for each figure, 100 at most, with names of 1 to 100 characters.",
        'Write it as {"balanced accuracy, kNN, held-out hospital": 0.91}, and run the command again.',
        "operator",
    ),
    Code.LOG_MISMATCH: CatalogEntry(
        "Database and log disagree",
        "A row of the database is not what the transparency log says was recorded: it was changed, removed or put in without the log. The "
        "log's leaf was written in the same transaction as the row, so nothing that pathfed does can cause this.",
        "Treat it as tampering or a damaged disk. Keep the database as it is, find out who had access to it, and restore the row from a "
        "backup that `pathfed-server log verify` passes.",
        "operator",
    ),
    Code.LOG_DAMAGED: CatalogEntry(
        "The log is not the one that was signed",
        "The leaves in the database do not give the root of a checkpoint that this server has signed, or an entry of the log is not what "
        "it says it is. The server signs no further checkpoint: sites would see a forked log, and rightly so.",
        "Restore the database from the newest backup in which `pathfed-server log verify` finds nothing. Sites have copies of what they "
        "cosigned and can say which history is theirs.",
        "operator",
    ),
    Code.LOG_BEHIND: CatalogEntry(
        "A site knows more of the log than there is",
        "The site has seen a larger log than the server has. The server's database was set back to an older state, or the site was shown "
        "another log.",
        "If the server was restored from a backup, restore a newer one, up to the size that the site knows. There is no honest way to go "
        "on with a shorter log: the sites will not cosign it.",
        "both",
    ),
    Code.CHECKPOINT_UNSIGNED: CatalogEntry(
        "No checkpoint of this size",
        "The log has signed no checkpoint of that size.",
        "Ask for the latest checkpoint and work with its size.",
        "both",
    ),
    Code.LEAF_UNKNOWN: CatalogEntry(
        "The leaf is not in the log",
        "The log of that size has no such leaf. What the leaf is about was not recorded, or only later than that.",
        "Ask again with the latest checkpoint's size. If a leaf that the server has acknowledged stays unknown, tell the operator: the "
        "site will not cosign.",
        "both",
    ),
    Code.COSIGNATURE_REFUSED: CatalogEntry(
        "The cosignature does not count",
        "The line is not a cosignature of this checkpoint by the site's present evidence key: it is malformed, has another name or key, or "
        "does not verify.",
        "After a key was rotated, cosign the latest checkpoint with the new key. Otherwise the site's key file is not the one that the "
        "server knows; compare the keys.",
        "both",
    ),
    Code.LINEAGE_UNKNOWN: CatalogEntry(
        "Nothing of this name has a lineage",
        "No site, release or run has this name, or several releases begin with these digits.",
        "See `pathfed-server sites list`, `pathfed-server run status` and `pathfed-server log leaves`, and give more digits.",
        "operator",
    ),
    Code.FIRST_STATE: CatalogEntry(
        "The run did not start where its plan says",
        "The first state's encoder is not the checkpoint that the plan's `encoder.init_from` names, or its random weights are not "
        "those that `encoder.init_seed` gives. The sites approved another start than the one they trained from. No patient is less "
        "private for it.",
        "Where random weights differ, verify again with the torch release that the server ran. If they still differ, or the "
        "checkpoint does, do not use the encoder, and ask the operator.",
        "both",
    ),
}

_HOST: dict[Code, CatalogEntry] = {
    Code.DISK_FULL: CatalogEntry(
        "The disk is full",
        "Writing failed for want of space or quota. Files are written whole or not at all: nothing is left half-written.",
        "Free space at the path which the message names. A command is run again and resumes. Nothing else is to be done: the server's "
        "round loop waits and goes on from the last committed round; a site answers the round with this code, or not at all where not even "
        "a code can be written down, and sends the same bytes when it is asked again, charged once.",
        "both",
    ),
    Code.PORT_IN_USE: CatalogEntry(
        "A port is in use",
        "Another program listens on the address and port that was asked for, or it may not be listened on.",
        "Stop that program (`ss -ltnp` names it), or choose another port. Ports below 1024 need rights of their own.",
        "both",
    ),
    Code.PROCESS_ENDED: CatalogEntry(
        "A process ended by itself",
        "One of the processes that pathfed started and watches has ended, or did not come up in time. It is started again by itself, "
        "and rounds go on: an offer that was lost with it is sent again, a charged round is the same release, a sealed update is sent as "
        "it is. A round loop or a server costs some seconds, a runner or a SuperNode about a minute, until Flower has noticed. A process "
        "that ends again and again within minutes is given up; then the others are shut down in order.",
        "Nothing, where it says that the process is started again. The message names the process and its log; the last lines there say "
        "why. Let a service manager start `pathfed-server start` and `pathfed-site start` again: they go on where they were.",
        "both",
    ),
    Code.HOME_UNUSABLE: CatalogEntry(
        "The home folder cannot be used",
        "The folder of this site, server or run is missing, not ours, in use by another process, not empty where it must be, or "
        "not writable.",
        "Check the path, its owner and its rights. One home serves one `start` at a time; stop the other one.",
        "both",
    ),
    Code.SETTINGS_INVALID: CatalogEntry(
        "The settings are invalid",
        "A settings or policy file, or an option of the command, has an unknown key, a wrong type, or a value out of bounds; or a "
        "policy's delta was changed, which is fixed for the ledger's life.",
        "The message names the file and the key, or the option. `--help` shows what each option takes.",
        "both",
    ),
    Code.KEY_FILE: CatalogEntry(
        "A key file cannot be used",
        "A key file is missing, is not a key of the right kind, or may be read by others than its owner.",
        "Give it back to its owner alone (`chmod 600`). A key that others could read should be replaced, not just hidden again.",
        "both",
    ),
    Code.TOOL_MISSING: CatalogEntry(
        "A program is missing",
        "A program that pathfed starts is not installed, or is not on the path.",
        "Install pathfed with the extra for this role, for instance `pip install 'pathfed[client]'`, and start it from the same "
        "environment.",
        "both",
    ),
    Code.SCHEDULER_LOST: CatalogEntry(
        "The Dask scheduler cannot be used",
        "The scheduler does not answer, has no worker, or was lost during the scan. What was read until then is in the site database; "
        "only the slides being read at that moment are read again.",
        "Start the scheduler and its workers again and run the same command: it resumes. Without `--scheduler` the scan runs on this "
        "machine alone.",
        "site",
    ),
    Code.SITE_UNFIT: CatalogEntry(
        "The doctor found errors",
        "`pathfed-site doctor` found something that keeps this site from taking part as it should. Nothing was changed.",
        "Each finding comes with a hint. Put right those marked `error`, from the top down, and run it again.",
        "site",
    ),
    Code.DEVICE_MISSING: CatalogEntry(
        "A GPU is not there",
        "The site's policy names a device, or a number of devices, that this machine does not have, or that its driver or its torch does "
        "not show. Nothing was charged.",
        "`nvidia-smi` shows the GPUs; `CUDA_VISIBLE_DEVICES` may hide some. Correct `device` or `devices` in `policy.toml`; with `cpu` a "
        "site trains without a GPU.",
        "site",
    ),
    Code.RANK_ENDED: CatalogEntry(
        "One of several training processes ended",
        "With several devices each has a process of its own. One of them ended, failed or took too long, and all were ended. Nothing was "
        "released. If the round was charged, the charge stays; the same offer again is the same release and costs nothing more.",
        "The site's log names the kind of error. Look for what ended the process: the kernel's log, another program on the GPU. The next "
        "offer starts the processes anew.",
        "site",
    ),
    Code.MEMORY_TOO_SMALL: CatalogEntry(
        "The memory is too small for this plan",
        "Training was tried on synthetic tiles, before any charge, and does not fit into the memory it may use, one tile at a time. "
        "Nothing was charged.",
        "Raise `device_memory_gb` in `policy.toml`, end what else uses the GPU, or share the model among more GPUs (`devices`, "
        "`sharding`). Otherwise this site cannot take part in a plan with this encoder.",
        "site",
    ),
    Code.EGRESS_RECORD_DAMAGED: CatalogEntry(
        "The egress record is gone or damaged",
        "The site's record of what left it cannot be found or read, or an entry of it was changed, dropped, swapped or added. Nothing "
        "leaves a site that cannot write it down. A running site also notices that the file was removed or replaced under it.",
        "Stop `pathfed-site start` first. Keep the file as evidence and find out what happened to it. To go on, put an empty file in its "
        "place (`touch egress.db`, mode 0600): a new record begins there. Write down when and why.",
        "site",
    ),
    Code.EGRESS_RECORD_BEHIND: CatalogEntry(
        "The egress record lacks a head that was noted",
        "A head of the egress record that was written down before is not in its chain: its end was cut off, it was put back to an earlier "
        "state, or another record lies in its place.",
        "Check that the noted head is this site's. If it is, keep the file and ask who had access to this machine since it was noted; the "
        "firewall's logs of this site's connections show what left meanwhile.",
        "site",
    ),
    Code.ENROLMENT_ELSEWHERE: CatalogEntry(
        "The home belongs to another server or site",
        "The invitation names another site than this home, or another server than the one this home belongs to. A home, with its keys and "
        "its ledger, is one site of one consortium. Nothing was sent.",
        "Give the right `--home`, or make a new home for the other consortium. Budgets of two consortia do not know of each other: a "
        "patient in both spends in both.",
        "site",
    ),
    Code.SIMULATION_ENGINE: CatalogEntry(
        "The simulation engine does not start",
        "`pathfed simulate` runs its virtual sites in processes of Ray, which did not come up. Ray gives them 30 seconds, and was tried "
        "five times.",
        "Look whether the machine is busy, or short of memory or of space under `/tmp`, where Ray keeps its files; then give the command "
        "again. `simulation.log` in the folder given by `--out` has Ray's own words.",
        "both",
    ),
}

CATALOG: Final[dict[Code, CatalogEntry]] = {**_PLANS, **_SITE_DATA, **_PRIVACY, **_TRANSPORT, **_ROUNDS, **_PROVENANCE, **_HOST}
